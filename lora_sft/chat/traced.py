"""Text that knows, for each of its characters, the message that it was written for."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, SupportsIndex

NOBODY = -1
"""Origin of a character that was written for no message (a preamble, the tools)."""


class Trace:
    """What is being written right now. One for each rendering."""

    def __init__(self) -> None:
        self.message = NOBODY  # index of the message whose turn in a loop it is
        self.saved: list[int] = []
        self.indices: dict[int, int] = {}  # id of a message → its index

    def template_origin(self) -> int:
        """Origin of a character of the template's own: even numbers; those of a message's own words are odd."""
        return NOBODY if self.message == NOBODY else 2 * self.message


def own_words(index: int) -> int:
    """Origin of a character that stands in a message."""
    return 2 * index + 1


class Traced(str):
    """Text that knows the origin of each of its characters; every method of `str` that makes text keeps it."""

    origins: list[int]
    trace: Trace

    def __new__(cls, text: str, origins: list[int], trace: Trace) -> "Traced":
        self = str.__new__(cls, text)
        self.origins, self.trace = origins, trace
        return self

    def _part(self, start: int, stop: int) -> "Traced":
        return Traced(str.__getitem__(self, slice(start, stop)), self.origins[start:stop], self.trace)

    def __str__(self) -> "Traced":
        return self

    def __add__(self, other: str) -> "Traced":
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(self, other), self.origins + origins_of(other, self.trace), self.trace)

    def __radd__(self, other: str) -> "Traced":
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(str(other), self), origins_of(other, self.trace) + self.origins, self.trace)

    def __mul__(self, times: SupportsIndex) -> "Traced":
        return Traced(str.__mul__(self, times), self.origins * times.__index__(), self.trace)

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> "Traced":
        origins = self.origins[key]
        return Traced(str.__getitem__(self, key), origins if isinstance(key, slice) else [origins], self.trace)

    def __iter__(self) -> Iterator["Traced"]:
        return (self._part(index, index + 1) for index in range(len(self)))

    def lstrip(self, chars: str | None = None) -> "Traced":
        return self._part(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> "Traced":
        return self._part(0, len(str.rstrip(self, chars)))

    def strip(self, chars: str | None = None) -> "Traced":
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> "Traced":
        return self._part(len(prefix), len(self)) if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> "Traced":
        return self._part(0, len(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def _pieces(self, pieces: Sequence[str]) -> list["Traced"]:
        """Parts of this text that stand in it in this order → the same parts, traced."""
        found, position = [], 0
        for piece in pieces:
            position = self.index(piece, position)
            found.append(self._part(position, position + len(piece)))
            position += len(piece)
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Traced"]:  # type: ignore[override]
        pieces = str.split(self, sep, maxsplit)
        if sep is None:
            return self._pieces(pieces)
        found, position = [], 0
        for piece in pieces:
            found.append(self._part(position, position + len(piece)))
            position += len(piece) + len(sep)
        return found

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Traced"]:  # type: ignore[override]
        pieces = str.rsplit(self, sep, maxsplit)
        found, position = [], len(self)
        for piece in reversed(pieces):
            position = self.rindex(piece, 0, position) if sep is None else position - len(piece)
            found.append(self._part(position, position + len(piece)))
            position -= 0 if sep is None else len(sep)
        return found[::-1]

    def splitlines(self, keepends: bool = False) -> list["Traced"]:  # type: ignore[override]
        found, position = [], 0
        for whole, shown in zip(str.splitlines(self, True), str.splitlines(self, keepends), strict=True):
            found.append(self._part(position, position + len(shown)))
            position += len(whole)
        return found

    def partition(self, sep: str) -> tuple["Traced", "Traced", "Traced"]:
        return self._cut(self.find(sep), sep, at_end=True)

    def rpartition(self, sep: str) -> tuple["Traced", "Traced", "Traced"]:
        return self._cut(self.rfind(sep), sep, at_end=False)

    def _cut(self, found: int, sep: str, at_end: bool) -> tuple["Traced", "Traced", "Traced"]:
        if found < 0:
            nothing = self._part(0, 0)
            return (self, nothing, nothing) if at_end else (nothing, nothing, self)
        end = found + len(sep)
        return self._part(0, found), self._part(found, end), self._part(end, len(self))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> "Traced":
        if not old:
            return self._same(str.replace(self, old, new, count))
        # What is put in stands for what it replaces.
        origins: list[int] = []
        position, left = 0, count.__index__()
        while left and (place := self.find(old, position)) >= 0:
            origins += self.origins[position:place]
            origins += self.origins[place : place + 1] * len(new)
            position, left = place + len(old), left - 1
        return Traced(str.replace(self, old, new, count), origins + self.origins[position:], self.trace)

    def join(self, parts: Iterable[str]) -> "Traced":
        return join(parts, self, self.trace)

    def _same(self, text: str) -> "Traced":
        """Text made out of this one, character for character if the length is the same."""
        if len(text) == len(self):
            return Traced(text, self.origins, self.trace)
        owner = max(self.origins, default=self.trace.template_origin())
        return Traced(text, [owner] * len(text), self.trace)

    def upper(self) -> "Traced":
        return self._same(str.upper(self))

    def lower(self) -> "Traced":
        return self._same(str.lower(self))

    def title(self) -> "Traced":
        return self._same(str.title(self))

    def capitalize(self) -> "Traced":
        return self._same(str.capitalize(self))

    def swapcase(self) -> "Traced":
        return self._same(str.swapcase(self))

    def casefold(self) -> "Traced":
        return self._same(str.casefold(self))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> "Traced":
        return self._same(str.expandtabs(self, tabsize))


def origins_of(text: str, trace: Trace) -> list[int]:
    """The origins of traced text; of other text the message that is being written now."""
    return text.origins if isinstance(text, Traced) else [trace.template_origin()] * len(text)


def join(parts: Iterable[Any], separator: str, trace: Trace) -> Traced:
    """`separator.join(parts)`, traced."""
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    if len(texts) == 1 and isinstance(texts[0], Traced):
        return texts[0]
    origins: list[int] = []
    between = origins_of(separator, trace) if separator else []
    for number, part in enumerate(texts):
        if number:
            origins += between
        origins += part.origins if isinstance(part, Traced) else origins_of(part, trace)
    return Traced(str.join(separator, texts), origins, trace)


class Run(NamedTuple):
    """A stretch of text of one origin.

    Attributes:
        start, end: offsets into the text.
        message: index of the message that it was written for, or NOBODY.
        is_own: whether it stands in the message itself; else the template wrote it.
    """

    start: int
    end: int
    message: int
    is_own: bool


def runs_of(text: Traced) -> list[Run]:
    """The text as stretches of one origin each, in order."""
    runs, position = [], 0
    for origin, stretch in groupby(text.origins):
        end = position + len(list(stretch))
        message = NOBODY if origin == NOBODY else origin // 2
        runs.append(Run(position, end, message, origin != NOBODY and origin % 2 == 1))
        position = end
    return runs
