"""What an adapter does to one matrix of the base: each edit computes any rows of it, in float32, without the rest.

A base parameter of two dimensions is one matrix, of three (fused experts) a stack of them; a vector is a matrix with
one column. Rows and columns are those of the parameter as the model holds it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Read = Callable[[], Tensor]
"""Reads a tensor of the adapter when it is needed: all of them at once can be large."""
ReadRows = Callable[[int, int], Tensor]
"""Reads some rows of one, (rows, columns)."""


@dataclass(frozen=True)
class Factors:
    """A low-rank update: scale · left @ right, with left (rows, rank) and right (rank, columns), both float32."""

    left: Tensor
    right: Tensor
    scale: float

    def add_to(self, matrix: Tensor, start: int) -> Tensor:
        """Adds the update to rows of the matrix that begin at `start`; in place."""
        return matrix.addmm_(self.left[start : start + len(matrix)], self.right, alpha=self.scale)

    @property
    def transposed(self) -> "Factors":
        """The update of the transposed matrix."""
        return Factors(self.right.T.contiguous(), self.left.T.contiguous(), self.scale)


@dataclass(frozen=True)
class LowRank:
    """LoRA on a parameter.

    Attributes:
        factors: reads left and right of a matrix; given its place in the stack, 0 where there is one only.
        scale: of the update.
        magnitude: DoRA's; each row (or column) of the sum is brought to this length.
        by_column: whether `magnitude` is that of columns.
        keys: of the adapter's tensors.
    """

    factors: Callable[[int], tuple[Tensor, Tensor]]
    scale: float
    keys: tuple[str, ...]
    magnitude: Read | None = None
    by_column: bool = False

    def of(self, matrix: int) -> Factors:
        """The update of one matrix of the stack."""
        left, right = self.factors(matrix)
        return Factors(left.float(), right.float(), self.scale)

    def weighted(self, weight: float) -> "LowRank":
        """The same with its update multiplied."""
        return replace(self, scale=self.scale * weight)


@dataclass(frozen=True)
class Replacement:
    """The parameter was trained whole (`modules_to_save`, biases): its own values take the base's place."""

    shape: tuple[int, ...]
    read: ReadRows
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Rows that were trained whole: the embeddings of single tokens."""

    indices: tuple[int, ...]
    read: Read
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Addition:
    """A vector that is added: the bias of LoRA's second matrix."""

    read: Read
    scale: float
    keys: tuple[str, ...]


Edit = LowRank | Replacement | Rows | Addition


@dataclass(frozen=True)
class Matrix:
    """One matrix of a parameter with all its edits, ready to be computed row by row.

    Attributes:
        factors: the updates that are added, one after another.
        lengths: DoRA's factor of each row (rows, 1) or column (1, columns).
        rows: {row: its trained values}.
        vector: added to a vector.
        dense: added to it: an update that is no product of two thin matrices.
    """

    factors: Sequence[Factors] = ()
    lengths: Tensor | None = None
    rows: Mapping[int, Tensor] = field(default_factory=dict)
    vector: Tensor | None = None
    dense: "Callable[[int, int], Tensor] | None" = None

    def apply(self, base: Tensor, start: int) -> Tensor:
        """Rows of the base from `start` on, float32, → the same rows of the merged matrix; may change `base`."""
        for factors in self.factors:
            factors.add_to(base, start)
        if self.vector is not None:
            base.add_(self.vector[start : start + len(base)].reshape(-1, 1))
        if self.dense is not None:
            base.add_(self.dense(start, start + len(base)))
        if self.lengths is not None:
            base.mul_(self.lengths if len(self.lengths) == 1 else self.lengths[start : start + len(base)])
        for row, values in self.rows.items():
            if start <= row < start + len(base):
                base[row - start] = values
        return base

    @property
    def transposed(self) -> "Matrix":
        """The same edits of the transposed matrix.

        Raises:
            NotImplementedError: single rows cannot be edited there.
        """
        if self.rows or self.dense or self.vector is not None:
            raise NotImplementedError("only low-rank updates are turned round")
        lengths = None if self.lengths is None else self.lengths.T.contiguous()
        return Matrix([factors.transposed for factors in self.factors], lengths)


def straight(a: Read, b: Read, _matrix: int) -> tuple[Tensor, Tensor]:
    """A (rank, inputs), B (outputs, rank) → factors of (outputs, inputs)."""
    return b(), a()


def turned(a: Read, b: Read, _matrix: int) -> tuple[Tensor, Tensor]:
    """A, B → factors of a matrix that is kept as (inputs, outputs)."""
    return a().T, b().T


def matrix_of(edits: Sequence[Edit], matrix: int, pieces: "Callable[[], Iterator[tuple[int, Tensor]]]") -> Matrix:
    """The edits of one parameter → those of one of its matrices.

    Args:
        matrix: its place in the stack.
        pieces: the base's rows, (where they begin, float32), once through; read for DoRA alone.
    """
    factors = [edit.of(matrix) for edit in edits if isinstance(edit, LowRank)]
    rows = {
        row: values
        for edit in edits
        if isinstance(edit, Rows)
        for row, values in zip(edit.indices, edit.read().float(), strict=True)
    }
    added = [edit.scale * edit.read().float() for edit in edits if isinstance(edit, Addition)]
    vector = torch.stack(added).sum(0) if added else None
    lengths = None
    for edit in edits:
        if isinstance(edit, LowRank) and edit.magnitude is not None:
            lengths = _dora_lengths(edit, factors, edit.magnitude().float(), pieces)
    return Matrix(factors, lengths, rows, vector)


def _dora_lengths(
    edit: LowRank,
    factors: Sequence[Factors],
    magnitude: Tensor,
    pieces: "Callable[[], Iterator[tuple[int, Tensor]]]",
) -> Tensor:
    """What each row (or column) of base + update is multiplied with, so that it gets its trained length."""
    squares: list[Tensor] = []
    for start, base in pieces():
        for one in factors:
            one.add_to(base, start)
        squares.append(base.square().sum(0 if edit.by_column else 1))
    summed = torch.stack(squares).sum(0) if edit.by_column else torch.cat(squares)
    factor = magnitude / summed.sqrt()
    return factor.reshape(1, -1) if edit.by_column else factor.reshape(-1, 1)
