"""A chat template → what it writes around messages and does to their words, found out by asking it.

Each message is given a word that occurs nowhere else. What stands between two of these words is taken to depend on the
two roles alone; where it does not, `Underivable` is raised. What is found here is a guess about all conversations from
some, so nothing is made of it without the proof in `go_proof.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from lora_sft.chat.tracing import FAILURES
from lora_sft.data.conversation import Message
from lora_sft.exporting.go.frame import (
    END,
    ROLES,
    START,
    WHITE,
    Empty,
    Frame,
    Reach,
    Treatment,
    Underivable,
    shared_start,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Render = Callable[[Sequence[Message], bool], "str | None"]
"""Messages, and whether a generation prompt is wanted → the text; None where the template refuses them."""

Thought = tuple[str, str]
"""What a reply holds before a thought, and between it and the answer."""


def renderer(tokenizer: "PreTrainedTokenizerBase", variables: Mapping[str, Any]) -> Render:
    """How transformers renders with the tokenizer's template.

    Args:
        variables: that the template was given in training.
    """

    def render(messages: Sequence[Message], wants_reply: bool) -> str | None:
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=wants_reply, **variables
                )
            )
        except FAILURES:
            return None

    return render


def find_frame(render: Render, reach: Reach, thoughts: Sequence[Thought] = ()) -> Frame:
    """What the template writes in the conversations of `reach`.

    Args:
        thoughts: what a reply may hold, as `find_thoughts` tells.

    Raises:
        Underivable: it depends on more than a `Frame` can say.
    """
    asked = _Asked(render, reach)
    between = asked.between()
    after = {role: asked.after(role, between) for role in {one for one, _ in between} - {START}}
    treatments = {pair: asked.treatment(pair, thoughts) for pair in between if pair[1] != END}
    frame = Frame(between, after, treatments, moves_system=asked.order is _moved, drops_system=asked.order is _dropped)
    if not reach.empty_contents:
        return frame
    roles = dict.fromkeys(role for _, role in treatments)
    empty = {role: found for role in roles if (found := _how_empty(asked.emptied(role), frame, role)) is not None}
    return replace(frame, empty=empty)


def find_thoughts(render: Render, source: str) -> list[Thought]:
    """What a reply of the model may hold before and behind a thought.

    Args:
        source: of the template.
    """
    asked, said = [{"role": "user", "content": _word(0)}], {"role": "assistant", "content": _word(2)}
    found = [("<think>\n", "\n</think>\n\n")] if "</think>" in source else []
    prompt, text = render(asked, True), render([*asked, {**said, "reasoning_content": _word(1)}], False)
    if prompt is not None and text is not None and text.startswith(prompt):
        before, thought, behind = text[len(prompt) :].partition(_word(1))
        behind, answer, _ = behind.partition(_word(2))
        found += [(before, behind)] if thought and answer else []
    return [
        (before, behind)
        for before, behind in dict.fromkeys(found)
        if render([*asked, {**said, "content": f"{before}{_word(1)}{behind}{_word(2)}"}, *asked], True) is not None
    ]


def _word(index: int) -> str:
    return f"qx{index}jz{index}vw"


def _words(roles: Sequence[str], contents: Mapping[int, str] | None = None) -> list[Message]:
    """Messages that say a word of their own each; `contents` are those that say something else."""
    return [{"role": role, "content": (contents or {}).get(i, _word(i))} for i, role in enumerate(roles)]


Order = Callable[[Sequence[str]], list[int]]
"""Roles → the indices of the messages in the order in which they are written."""


def _as_given(roles: Sequence[str]) -> list[int]:
    return list(range(len(roles)))


def _moved(roles: Sequence[str]) -> list[int]:
    """The system message before the last one."""
    rest = _dropped(roles)
    return [*rest[:-1], *(i for i, role in enumerate(roles) if role == "system"), *rest[-1:]]


def _dropped(roles: Sequence[str]) -> list[int]:
    return [i for i, role in enumerate(roles) if role != "system"]


class _Asked:
    """A template that is asked."""

    def __init__(self, render: Render, reach: Reach) -> None:
        every = (roles for length in range(1, 6) for roles in product(ROLES, repeat=length))
        self.render = render
        self.texts = {
            roles: text for roles in every if reach.holds(roles) and (text := render(_words(roles), True)) is not None
        }
        if not self.texts:
            raise Underivable("it refuses every conversation that was tried")
        self.order = self._order()

    def _order(self) -> Order:
        for order in (_as_given, _moved, _dropped):
            if all(_written(text, len(roles)) == order(roles) for roles, text in self.texts.items()):
                return order
        raise Underivable("it leaves out messages, writes them twice or in another order")

    def neighbours(self, roles: Sequence[str]) -> list[str]:
        """The roles in the order in which they are written, with `START` and `END`."""
        return [START, *(roles[i] for i in self.order(roles)), END]

    def between(self) -> dict[tuple[str, str], str]:
        """What stands between the words of two roles."""
        between: dict[tuple[str, str], str] = {}
        for roles, text in self.texts.items():
            rest = text
            for pair, index in zip(pairwise(self.neighbours(roles)), [*self.order(roles), None], strict=True):
                literal, _, rest = rest.partition(_word(index)) if index is not None else (rest, "", "")
                if between.setdefault(pair, literal) != literal:
                    raise Underivable(f"what it writes between {_named(pair)} depends on other messages")
        return between

    def after(self, role: str, between: Mapping[tuple[str, str], str]) -> str:
        """What belongs to a message's end: all that its followers have in common."""
        texts = {other: text for (one, other), text in between.items() if one == role}
        common, closing = shared_start(texts.values()), self._closing(role)
        if closing is not None and common.startswith(closing):
            return closing
        if len(texts) > 1:
            return common
        (follower,) = texts  # what it writes behind other roles too is its own
        others = [text[::-1] for (one, other), text in between.items() if other == follower and one != role]
        own = shared_start([common[::-1], *others])[::-1] if others else ""
        return common.removesuffix(own) if own else ""

    def _closing(self, role: str) -> str | None:
        """What stands behind a message of this role where neither another one nor a reply is to come."""
        begun = (roles[: i + 1] for roles in self.texts for i in range(len(roles)) if roles[i] == role)
        for beginning in begun:
            text, last = self.render(_words(beginning), False), self.order(beginning)[-1:]
            if text is not None and last and _word(last[0]) in text:
                return text.rpartition(_word(last[0]))[2]
        return None

    def treatment(self, pair: tuple[str, str], thoughts: Sequence[Thought]) -> Treatment:
        """What is done to the words of the second role behind the first."""
        ends = ("", " ", "\n", "\n\n", " \n", "\t", "\u00a0", "\u3000\n")
        sets = ("", "\n", " ", " \n", WHITE)
        word = _word(99)
        seen = {text: self._written(pair, text) for end in ends for text in (end + word, word + end)}
        plain = _first_that_fits(seen, (Treatment(left=left, right=right) for left, right in product(sets, sets)))
        if plain is None:
            raise Underivable(f"it changes the words of a message ({pair[1]}) in a way that is not known here")
        if pair[1] != "assistant" or not thoughts:
            return plain
        for before, behind in thoughts:
            for text in (f"{before}thought{behind}", *(f"{before}thought{behind.strip()}{end}" for end in ends)):
                seen[text + word] = self._written(pair, text + word)
        marks = dict.fromkeys(behind.strip() for _, behind in thoughts)
        cuts = (
            replace(plain, cut=mark, behind_cut=behind, cuts_last=last)
            for mark, behind, last in product(marks, sets, (False, True))
        )
        thinking = _first_that_fits(seen, (plain, *cuts))
        if thinking is None:
            raise Underivable("it rewrites the thought that a reply holds in a way that is not known here")
        return thinking

    def _written(self, pair: tuple[str, str], content: str) -> str:
        """What is written for these words of the second role of a pair."""
        roles, index = self._place_of(pair)
        before, _, behind = self.texts[roles].partition(_word(index))
        text = self.render(_words(roles, {index: content}), True)
        if text is None or not (text.startswith(before) and text.endswith(behind)):
            raise Underivable(f"what it writes around a message ({pair[1]}) depends on the words in it")
        return text[len(before) : len(text) - len(behind)]

    def _place_of(self, pair: tuple[str, str]) -> tuple[tuple[str, ...], int]:
        """A short conversation in which the second role of the pair follows the first, and the message's index."""
        for roles in self.texts:
            for found, index in zip(pairwise(self.neighbours(roles)), self.order(roles), strict=False):
                if found == pair:
                    return roles, index
        raise Underivable(f"no conversation has {_named(pair)}")

    def emptied(self, role: str) -> dict[str, dict[tuple[str, str], str]]:
        """{content: {the roles around: the text between their words}} of messages that say nothing."""
        seen: dict[str, dict[tuple[str, str], str]] = {"": {}, " \n": {}}
        for roles in self.texts:
            found, shown = self.order(roles), self.neighbours(roles)
            words = [None, *(_word(i) for i in found), None]
            for place, index in enumerate(found):
                for content in seen if roles[index] == role else ():
                    text = self.render(_words(roles, {index: content}), True)
                    if text is not None:
                        text = _cut_out(text, words[place], words[place + 2])
                    if text is None or seen[content].setdefault((shown[place], shown[place + 2]), text) != text:
                        raise Underivable(f"what it writes for an empty message ({role}) depends on other messages")
        return seen


def _written(text: str, count: int) -> list[int]:
    """The messages in the order in which their words stand in the text; none if one stands there twice."""
    places = [(text.find(_word(i)), i) for i in range(count)]
    once = all(text.count(_word(i)) <= 1 for i in range(count))
    return [i for place, i in sorted(places) if place >= 0] if once else []


def _first_that_fits(seen: Mapping[str, str], treatments: Iterable[Treatment]) -> Treatment | None:
    return next((t for t in treatments if all(t(content) == written for content, written in seen.items())), None)


def _cut_out(text: str, before: str | None, behind: str | None) -> str:
    """What stands between two words."""
    text = text.partition(before)[2] if before else text
    return text.partition(behind)[0] if behind else text


def _how_empty(seen: Mapping[str, Mapping[tuple[str, str], str]], frame: Frame, role: str) -> Empty | None:
    """What was seen of a role's messages that say nothing → how they are written; None if as any other."""
    as_any = {
        content: all(
            text == frame.between[one, role] + frame.treatments[one, role](content) + frame.between[role, other]
            for (one, other), text in texts.items()
        )
        for content, texts in seen.items()
    }
    if all(as_any.values()):
        return None
    if as_any[""] or not (as_any[" \n"] or seen[""] == seen[" \n"]):
        raise Underivable(f"it writes an empty message ({role}) in a way that is not known here")
    return Empty(_instead(seen[""], frame, role), raw=as_any[" \n"])


def _instead(seen: Mapping[tuple[str, str], str], frame: Frame, role: str) -> dict[str, str] | None:
    if all(frame.between.get(pair) == text for pair, text in seen.items()):
        return None
    instead: dict[str, str] = {}
    for (one, other), text in seen.items():
        behind, closing = frame.between[role, other], frame.after.get(one, "")
        opening = text.removesuffix(behind)
        if not (text.endswith(behind) and opening.startswith(closing)):
            raise Underivable(f"it writes an empty message ({role}) in a way that is not known here")
        if instead.setdefault(one, opening[len(closing) :]) != opening[len(closing) :]:
            raise Underivable(f"what it writes for an empty message ({role}) depends on other messages")
    return instead


def _named(pair: tuple[str, str]) -> str:
    names = {START: "the start", END: "the end"}
    return " and ".join(names.get(role, role) for role in pair)
