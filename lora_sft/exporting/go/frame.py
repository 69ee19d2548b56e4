"""What a chat template writes around messages and does to their words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from os.path import commonprefix

START, END = "", "end"
WHITE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
"""What Python, and so a template's `trim`, takes for white space."""

ROLES = ("system", "user", "assistant")


class Underivable(Exception):  # noqa: N818 - an answer, which the caller turns into a refusal
    """Why no Go template can be derived."""


@dataclass(frozen=True)
class Treatment:
    """What is done to the words of a message.

    Attributes:
        cut: a marker; what stands before its last occurrence is left out, and the marker too.
        behind_cut: characters that are stripped behind it.
        left, right: characters that are stripped from the ends.
        cuts_last: whether the ends are stripped before the cut.
    """

    cut: str = ""
    behind_cut: str = ""
    left: str = ""
    right: str = ""
    cuts_last: bool = False

    def __call__(self, text: str) -> str:
        """The words as they are written."""
        if self.cuts_last:
            return self._behind_cut(_stripped(text, self.left, self.right))
        return _stripped(self._behind_cut(text), self.left, self.right)

    def _behind_cut(self, text: str) -> str:
        if not self.cut or self.cut not in text:
            return text
        return _stripped(text.split(self.cut)[-1], self.behind_cut, "")


@dataclass(frozen=True)
class Empty:
    """How a message without words is written, where that is not as any other.

    Attributes:
        instead: {role before: the text in place of what else stands before the words}; None leaves the message out.
        raw: whether only "" counts as empty; else also what nothing is left of after the treatment.
    """

    instead: Mapping[str, str] | None
    raw: bool


@dataclass(frozen=True)
class Frame:
    """What a template writes.

    Attributes:
        between: {(role, next role): the text between the words of the two}; `START` and `END` stand for roles.
        after: {role: the part of that which belongs to the first of the two}.
        treatments: {(role before, role): what is done to the words}.
        empty: {role: how it is written without words}.
        moves_system: whether the system message is written before the last user message.
        drops_system: whether it is not written at all.
    """

    between: Mapping[tuple[str, str], str]
    after: Mapping[str, str]
    treatments: Mapping[tuple[str, str], Treatment] = field(default_factory=dict)
    empty: Mapping[str, Empty] = field(default_factory=dict)
    moves_system: bool = False
    drops_system: bool = False

    def before(self, role: str) -> dict[str, str]:
        """{role before: the text between the two that belongs to `role`}."""
        return {
            previous: text.removeprefix(self.after.get(previous, ""))
            for (previous, following), text in self.between.items()
            if following == role
        }


@dataclass(frozen=True)
class Reach:
    """Which conversations a Go template is derived for and proven on; all end with a user message.

    Attributes:
        system_anywhere: system messages also later than at the start.
        assistant_first: conversations that begin with a reply.
        empty_contents: messages that say nothing.
    """

    system_anywhere: bool
    assistant_first: bool
    empty_contents: bool

    def holds(self, roles: Sequence[str]) -> bool:
        """Whether a conversation of these roles belongs to it."""
        rest = roles[1:] if roles[0] == "system" else roles
        if not rest or rest[-1] != "user" or any(one == other for one, other in pairwise(roles)):
            return False  # Ollama makes one message of two of the same role
        return (self.system_anywhere or "system" not in rest) and (self.assistant_first or rest[0] != "assistant")


def shared_start(texts: Iterable[str]) -> str:
    """The text that all of them begin with."""
    return commonprefix([*texts])  # noqa: RUF071 - these are no paths


def _stripped(text: str, left: str, right: str) -> str:
    text = text.lstrip(left) if left else text
    return text.rstrip(right) if right else text
