"""A written model, base and adapter, all in files → every tensor checked, without any model loaded."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lora_sft.merging.base_files import weight_tensors
from lora_sft.merging.edits import LowRank
from lora_sft.merging.merged import MergedModel
from lora_sft.merging.weight_check import Expected, WeightCheck, check_tensor, random_vectors, steps


def check_files(merged: MergedModel, folder: Path) -> WeightCheck:
    """Every written tensor against base and adapter, each row multiplied with random vectors."""
    written = weight_tensors(folder)
    found = []
    for name, tensor in written.items():
        pieces = projected(merged, name, tensor.read)
        found.append(check_tensor(name, tensor.dtype, merged.is_edited(name), pieces))
    return WeightCheck(found)


def projected(merged: MergedModel, name: str, read: Callable[[int, int], Tensor]) -> Expected:
    """Row by row: written · x, base · x, and what it must be · x."""
    stored = merged.base.stored[name]
    if not stored.dtype.is_floating_point:
        yield from ((a.float(), b.float(), b.float()) for a, b in [(read(0, stored.rows), stored.read(0, stored.rows))])
        return
    vectors = random_vectors(stored.columns, name)
    base_rows, start = merged.base.rows(name), 0
    thin = _thin(merged, name)
    products = [(left, scale * (right @ vectors)) for left, right, scale in thin] if thin else []
    for piece in merged.pieces(name) if thin is None else steps(stored.rows, stored.columns):
        count = piece if isinstance(piece, int) else len(piece)
        stop = start + count
        base = base_rows(start, min(stop, stored.rows))
        base = torch.nn.functional.pad(base, (0, 0, 0, count - len(base))) @ vectors
        if isinstance(piece, int):
            expected = base.clone()
            for left, product in products:
                expected += left[start:stop] @ product
        else:
            expected = piece @ vectors
        yield read(start, stop).float() @ vectors, base, expected
        start = stop


def _thin(merged: MergedModel, name: str) -> list[tuple[Tensor, Tensor, float]] | None:
    """The factors of a tensor that is base + low-rank updates and nothing else; None where it is more than that."""
    edits = merged.edits_of(name)
    place = merged.base.places.get(name)
    simple = place is None or (place.matrix is None and not place.turned and place.first_row == 0)
    if not simple or merged.blend.is_dense or len(merged.shapes[name]) != 2:
        return None if edits else []
    if any(not isinstance(edit, LowRank) or edit.magnitude is not None for edit in edits):
        return None
    parts = [edit.of(0) for edit in edits if isinstance(edit, LowRank)]
    return [(part.left, part.right, part.scale) for part in parts]
