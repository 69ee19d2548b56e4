"""The written tensors and what each must be → whether every update is there in full, and nothing else was changed.

Two numbers are taken of every tensor: which share of the update it holds (1 if all is well; 0 for a forgotten module,
1/2 for a halved alpha), and how far it is from what it must be, beside what rounding explains. Whole tensors are not
held: rows are multiplied with random vectors, which keeps differences in the mean.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 2**21
"""Numbers that are looked at together."""
VECTORS = 8
"""Random vectors that each row is multiplied with."""

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}
"""The most by which rounding to a dtype changes a number, as a share of it; on average it is about half."""
ARITHMETIC = 1e-5
"""What the order of a float32 sum explains, as a share."""
TOLERANCE = 0.02
"""How far from 1 the share of an update may be; more where the update is small beside rounding."""

Expected = Iterator[tuple[Tensor, Tensor, Tensor]]
"""Row by row: as written, in the base, as it must be; each (rows, columns) in float32, or projected alike."""


@dataclass(frozen=True)
class TensorCheck:
    """One tensor.

    Attributes:
        kept: the share of the update that is in it; None where nothing was to be changed.
        apart: its distance from what it must be, as a share of its length.
        allowed: what rounding explains of that.
        doubt: how far `kept` may be from 1 by chance.
    """

    name: str
    kept: float | None
    apart: float
    allowed: float
    doubt: float

    @property
    def holds(self) -> bool:
        """Whether it is what it must be, up to rounding."""
        whole = self.kept is None or abs(self.kept - 1) <= max(TOLERANCE, self.doubt)
        return whole and self.apart <= self.allowed


@dataclass(frozen=True)
class WeightCheck:
    """All tensors of a model."""

    tensors: list[TensorCheck]

    @property
    def failing(self) -> list[TensorCheck]:
        """Those that are not what they must be."""
        return [one for one in self.tensors if not one.holds]

    @property
    def edited(self) -> list[TensorCheck]:
        """Those that the adapter changes."""
        return [one for one in self.tensors if one.kept is not None]

    def summary(self) -> dict[str, float | int]:
        """{"tensors", "edited", "failing", "least_kept", "most_apart"}; the last as a share of what is allowed."""
        return {
            "tensors": len(self.tensors),
            "edited": len(self.edited),
            "failing": len(self.failing),
            "least_kept": min((one.kept for one in self.edited if one.kept is not None), default=1.0),
            "most_apart": max((one.apart / one.allowed for one in self.tensors), default=0.0),
        }

    def __str__(self) -> str:
        if not self.failing:
            found = self.summary()
            return f"{found['edited']} of {found['tensors']} tensors changed, each as it must be"
        worst = max(self.failing, key=lambda one: one.apart / one.allowed)
        kept = "" if worst.kept is None else f", {worst.kept:.1%} of the update is in it"
        return (
            f"{len(self.failing)} of {len(self.tensors)} tensors are not what they must be; the worst is {worst.name} "
            f"(apart by {worst.apart:.1e} of its length{kept}; rounding explains {worst.allowed:.1e})"
        )


def random_vectors(columns: int, name: str) -> Tensor:
    """(columns, VECTORS) of ones with random signs: products keep lengths in the mean. A vector is left as it is."""
    if columns == 1:
        return torch.ones(1, 1)
    generator = torch.Generator().manual_seed(len(name) + columns)
    return torch.randint(0, 2, (columns, VECTORS), generator=generator).float() * 2 - 1


def check_tensor(name: str, dtype: torch.dtype, is_edited: bool, pieces: Expected, slack: float = 0.0) -> TensorCheck:
    """One tensor against what it must be.

    Args:
        dtype: that it was written in.
        is_edited: whether the adapter changes it.
        slack: what else explains a difference, as a share.
    """
    shared = update = apart = length = 0.0
    count = 0
    for written, base, expected in pieces:
        change = expected - base
        shared += ((written - base) * change).sum(dtype=torch.float64).item()
        update += change.square().sum(dtype=torch.float64).item()
        apart += (written - expected).square().sum(dtype=torch.float64).item()
        length += expected.square().sum(dtype=torch.float64).item()
        count += written.numel()
    share = math.sqrt(apart / length) if length else math.sqrt(apart)
    kept = shared / update if is_edited and update > 0 else None
    doubt = 4 * math.sqrt(apart / max(count, 1) / update) if update > 0 else 0.0
    allowed = ROUNDING.get(dtype, 0.0) + ARITHMETIC + slack
    return TensorCheck(name, kept, share if math.isfinite(share) else math.inf, allowed, min(doubt, 0.5))


def steps(rows: int, columns: int) -> Iterator[int]:
    """How many rows are looked at together, until all were."""
    step = max(PIECE // columns, 1)
    for start in range(0, rows, step):
        yield min(step, rows - start)
