"""Several adapters → one update: their exact weighted sum, or TIES and DARE on the true updates.

PEFT combines the thin matrices, which for TIES and DARE is not the same as combining the updates that they stand for.
Here each update is computed row by row, so that no whole one need be held.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_sft.errors import ModelError, SettingError
from lora_sft.merging.edits import Edit, Factors, LowRank

KINDS = ("linear", "ties", "dare_linear", "dare_ties")

PIECE = 2**21


@dataclass(frozen=True)
class Blend:
    """How several adapters are added up.

    Attributes:
        weights: of each.
        kind: linear; ties (small changes and those against the majority's sign are left out); dare_linear, dare_ties
            (changes are left out by lot and the others enlarged).
        density: share of the changes that stay, for all kinds but linear.
        seed: of the lot.
    """

    weights: tuple[float, ...]
    kind: str = "linear"
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"combination {self.kind!r} is not one of {', '.join(KINDS)}")
        if not 0 < self.density <= 1:
            raise SettingError(f"density {self.density} is not above 0 and at most 1")

    @classmethod
    def even(cls, count: int) -> "Blend":
        """The plain sum."""
        return cls((1.0,) * count)

    @property
    def is_dense(self) -> bool:
        """Whether the sum is no product of thin matrices."""
        return self.kind != "linear"


def check_blend(folders: Sequence[Path], edits: Sequence[Mapping[str, Sequence[Edit]]], blend: Blend) -> None:
    """Only plain updates can be weighted and added.

    Raises:
        SettingError: as many weights as adapters are needed.
        ModelError: an adapter does more than that.
    """
    if len(blend.weights) != len(folders):
        raise SettingError(f"{len(blend.weights)} weights for {len(folders)} adapters; give one for each")
    if blend == Blend.even(1):
        return
    for folder, one in zip(folders, edits, strict=True):
        for parameter, there in one.items():
            if any(not isinstance(edit, LowRank) or edit.magnitude is not None for edit in there):
                raise ModelError(
                    f"{folder}: {parameter} is trained whole or by DoRA, and cannot be weighted or added to others; "
                    "merge this adapter alone"
                )


def dense_update(updates: Sequence[Sequence[Factors]], blend: Blend, name: str) -> Callable[[int, int], Tensor]:
    """The updates of one matrix by each adapter → (start, stop) → those rows of the combined update, float32.

    Args:
        updates: of each adapter; an empty one leaves the matrix as it is.
        name: of the matrix; the lot is drawn for each one apart.
    """
    there = [(each, weight) for each, weight in zip(updates, blend.weights, strict=True) if each]
    first = there[0][0][0]
    shape = (len(first.left), first.right.shape[1])
    kept = [_kept(each, shape, blend, f"{name}/{number}") for number, (each, _) in enumerate(there)]

    def rows(start: int, stop: int) -> Tensor:
        changes = torch.stack([keep(start, stop) for keep in kept])
        weighted = changes * torch.tensor([weight for _, weight in there]).view(-1, 1, 1)
        if blend.kind == "dare_linear":
            return weighted.sum(0)
        agree = changes.sign() == changes.sum(0).sign()  # the majority by size, weights aside, as in PEFT
        count = (agree & (changes != 0)).sum(0).clamp(min=1)
        return (weighted * agree).sum(0) / count

    return rows


def _kept(each: Sequence[Factors], shape: tuple[int, int], blend: Blend, name: str) -> Callable[[int, int], Tensor]:
    """One adapter's update with what is left out at 0."""

    def update(start: int, stop: int) -> Tensor:
        rows = torch.zeros(stop - start, shape[1])
        for factors in each:
            factors.add_to(rows, start)
        return rows

    if blend.kind == "ties":
        limit = _kth_largest(update, shape, int(blend.density * shape[0] * shape[1]))
        return lambda start, stop: torch.where((rows := update(start, stop)).abs() >= limit, rows, 0.0)
    seed = int.from_bytes(hashlib.sha256(f"{blend.seed}/{name}".encode()).digest()[:8], "little")

    def drawn(start: int, stop: int) -> Tensor:
        # One number for each weight, whatever rows are asked for.
        lot = np.random.Generator(np.random.PCG64(seed).advance(start * shape[1]))
        stays = torch.from_numpy(lot.random((stop - start, shape[1])) < blend.density)
        return torch.where(stays, update(start, stop) / blend.density, 0.0)

    return drawn


def _kth_largest(update: Callable[[int, int], Tensor], shape: tuple[int, int], k: int) -> float:
    """The k-th largest absolute value of an update that is never held whole: found bit by bit, in two passes.

    Floats that are not negative have the order of their bits.
    """
    if k <= 0:
        return float("inf")
    step = max(PIECE // shape[1], 1)

    def counts(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        total = np.zeros(2**16, dtype=np.int64)
        for start in range(0, shape[0], step):
            bits = update(start, min(start + step, shape[0])).abs().numpy().view(np.uint32)
            total += np.bincount(of(bits).ravel(), minlength=2**16)
        return total

    upper, above = _nth_bin(counts(lambda bits: bits >> 16), k)
    lower, _ = _nth_bin(counts(lambda bits: (bits & 0xFFFF)[(bits >> 16) == upper]), k - above)
    return float(np.array([upper << 16 | lower], dtype=np.uint32).view(np.float32)[0])


def _nth_bin(counts: np.ndarray, k: int) -> tuple[int, int]:
    """From the top: the bin with the k-th one, and how many lie above it."""
    from_top = np.cumsum(counts[::-1])
    index = int(np.searchsorted(from_top, k))
    return len(counts) - 1 - index, int(from_top[index - 1]) if index else 0
