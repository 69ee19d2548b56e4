"""The blocks that a step asks for → what PyTorch's caching allocator takes from a GPU for them.

It keeps what it once took. Small blocks are cut out of segments of 2 MiB, larger ones out of 20 MiB, the largest have
segments of their own; a free block serves the next that it is large enough for, and what is left of it another.

Source: `CUDACachingAllocator.cpp` of PyTorch 2.13, with its default settings; unverified on a GPU.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

SMALLEST, SMALL, SMALL_SEGMENT = 512, 2**20, 2 * 2**20
LARGE, LARGE_SEGMENT, LARGE_STEP = 10 * 2**20, 20 * 2**20, 2 * 2**20


def rounded(count: int) -> int:
    """Bytes of the block that so many bytes are given."""
    return max(SMALLEST, -(-count // SMALLEST) * SMALLEST)


@dataclass(eq=False)
class _Piece:
    """A stretch of a segment.

    Attributes:
        start: its address; segments lie far apart.
        size: in bytes.
        is_free: whether nobody uses it.
        left, right: its neighbours in the segment.
    """

    start: int
    size: int
    is_free: bool = False
    left: "_Piece | None" = None
    right: "_Piece | None" = None


class CachingAllocator:
    """Follows blocks.

    Attributes:
        reserved: bytes that were taken from the GPU; they are not given back.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # small or not: (size, address), sorted
        self._pieces: dict[int, _Piece] = {}
        self._used: dict[int, tuple[_Piece, bool]] = {}
        self._end = 0

    def take(self, number: int, count: int) -> None:
        """Block `number` of so many bytes is asked for."""
        size = rounded(count)
        is_small = size <= SMALL
        free = self._free[is_small]
        place = bisect_left(free, (size, -1))
        piece = self._pieces[free.pop(place)[1]] if place < len(free) else self._segment(size, is_small)
        left_over = piece.size - size
        if left_over >= SMALLEST if is_small else left_over > SMALL:
            rest = _Piece(piece.start + size, left_over, True, piece, piece.right)
            if piece.right is not None:
                piece.right.left = rest
            piece.right, piece.size = rest, size
            self._put(rest, is_small)
        piece.is_free = False
        self._used[number] = piece, is_small

    def give_back(self, number: int) -> None:
        """Nobody uses block `number` any more; free neighbours become one."""
        piece, is_small = self._used.pop(number)
        for neighbour in (piece.left, piece.right):
            if neighbour is not None and neighbour.is_free:
                self._drop(neighbour, is_small)
                first, second = (neighbour, piece) if neighbour is piece.left else (piece, neighbour)
                first.size, first.right = first.size + second.size, second.right
                if second.right is not None:
                    second.right.left = first
                piece = first
        piece.is_free = True
        self._put(piece, is_small)

    def _segment(self, size: int, is_small: bool) -> _Piece:
        whole = SMALL_SEGMENT if is_small else LARGE_SEGMENT if size < LARGE else -(-size // LARGE_STEP) * LARGE_STEP
        self.reserved += whole
        piece = _Piece(self._end, whole)
        self._end += whole
        return piece

    def _put(self, piece: _Piece, is_small: bool) -> None:
        self._pieces[piece.start] = piece
        insort(self._free[is_small], (piece.size, piece.start))

    def _drop(self, piece: _Piece, is_small: bool) -> None:
        free = self._free[is_small]
        free.pop(bisect_left(free, (piece.size, piece.start)))


def reserved_bytes(sizes: Iterable[int], events: Iterable[int]) -> int:
    """What is reserved at the end of so many events: n takes block n, ~n gives it back."""
    every, allocator = list(sizes), CachingAllocator()
    for event in events:
        if event >= 0:
            allocator.take(event, every[event])
        else:
            allocator.give_back(~event)
    return allocator.reserved
