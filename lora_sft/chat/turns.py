"""Traced text → where each reply starts and ends, and what a person should know of it.

For assistant turn i the model is given P = the messages before it, rendered with the generation prompt. It must
produce everything after that, through the first stop token behind the message's own last character.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, takewhile
from operator import itemgetter
from typing import NamedTuple, Protocol

from lora_sft.chat.traced import NOBODY, Run
from lora_sft.errors import TemplateError

# What a note says, from harmless to harmful.
HISTORY_DIFFERS = "history differs"
MARKS_DIFFER = "marks differ"
CONTROL_TOKEN = "control token in text"
STOP_GUESSED = "stop token guessed"
PROMPT_MISMATCH = "prompt mismatch"
REWRITTEN = "rewritten"
DROPPED = "dropped"
NO_STOP_TOKEN = "no stop token"
STATUSES = (
    HISTORY_DIFFERS,
    MARKS_DIFFER,
    CONTROL_TOKEN,
    STOP_GUESSED,
    PROMPT_MISMATCH,
    REWRITTEN,
    DROPPED,
    NO_STOP_TOKEN,
)
HARMFUL = (DROPPED, NO_STOP_TOKEN)

START, END = itemgetter(0), itemgetter(1)


class Note(NamedTuple):
    """What a person should know of one assistant turn (counted from 0)."""

    turn: int
    status: str
    words: str


@dataclass(frozen=True)
class Extent:
    """Where a message stands in the text.

    Attributes:
        first, last: offsets of the first and behind the last character written for it.
        own_start, own_end: the same of its own words; both `last` if there are none.
        tail: offset behind what is written for it right behind its own words.
    """

    first: int
    last: int
    own_start: int
    own_end: int
    tail: int


class Reply(NamedTuple):
    """Where a reply stands, and [(status, words)] of what a person should know.

    `needs_stop` is where a stop token would have to be put in; None if the template writes one.
    """

    start: int
    end: int
    notes: list[tuple[str, str]]
    needs_stop: int | None = None


class Given(Protocol):
    """What stands before a reply (`prompts.py`)."""

    def end_of_prompt(self, index: int) -> int | None:
        """Where in the text the prompt of message `index` ends; None if the text does not begin with it."""

    def given(self, index: int) -> str | None:
        """What the model is given before it writes message `index`; None if the template refuses it."""

    def generation_prompt(self, index: int) -> str | None:
        """What the template adds when that reply is to come; None if it cannot be told."""


def extents_of(runs: Sequence[Run]) -> dict[int, Extent]:
    """{index of a message: its extent}."""
    places: dict[int, list[int]] = {}
    for place, run in enumerate(runs):
        if run.message != NOBODY:
            places.setdefault(run.message, []).append(place)
    return {message: _extent(runs, _without_quotes(runs, found)) for message, found in places.items()}


def _without_quotes(runs: Sequence[Run], places: list[int]) -> list[int]:
    """Leaves out where another message's text repeats a word of this one, a function's name for instance."""

    def is_quote(place: int) -> bool:
        if not runs[place].is_own or not 0 < place < len(runs) - 1:
            return False
        before, behind = runs[place - 1].message, runs[place + 1].message
        return before == behind and before not in (NOBODY, runs[place].message)

    return [place for place in places if not is_quote(place)] or places


def _extent(runs: Sequence[Run], places: Sequence[int]) -> Extent:
    mine = [runs[place] for place in places]
    own = [run for run in mine if run.is_own]
    tail = len(runs)
    if own:
        following = places[mine.index(own[-1]) :]
        tail = next((place for place, back in pairwise(following) if back != place + 1), following[-1])
    return Extent(
        mine[0].start,
        mine[-1].end,
        own[0].start if own else mine[-1].end,
        own[-1].end if own else mine[-1].end,
        runs[tail].end if own else mine[-1].end,
    )


def find_reply(
    text: str,
    runs: Sequence[Run],
    extents: dict[int, Extent],
    index: int,
    prompts: Given,
    stops: Sequence[str],
    control_tokens: Sequence[tuple[int, int]] = (),
) -> Reply:
    """Where the reply stands that is at `index` among the messages.

    Args:
        stops: the known stop tokens.
        control_tokens: where the template writes special tokens; one of them may have to pass for a stop token.

    Raises:
        TemplateError: the template mixes it with another message.
    """
    extent = extents.get(index)
    if extent is None:
        return Reply(0, 0, [(DROPPED, "the template writes nothing for it")])
    notes: list[tuple[str, str]] = []
    start, status = _start(text, extent, index, prompts, stops)
    if status == PROMPT_MISMATCH:
        notes.append((status, "the prompt that comes before this reply in use is not what stands before it here"))
    elif status:
        notes.append((status, "earlier turns are rendered otherwise when the reply is still to come"))
    words_end = max(start, extent.own_end if extent.own_start < extent.own_end else start)
    behind = bisect_left(runs, words_end, key=START)
    limit = next((run.start for run in islice(runs, behind, None) if run.is_own), len(text))
    end = _through_stop_token(text, words_end, max(words_end, extent.tail), limit, stops)
    needs_stop = None
    if end is None and (guess := _control_token(text, words_end, extent.tail, limit, control_tokens)):
        end = guess[1]
        notes.append((STOP_GUESSED, f"{text[slice(*guess)]} is taken for its stop token"))
    if end is None:
        known = ", ".join(stops) or "(no stop token known)"
        notes.append((NO_STOP_TOKEN, f"the template does not end the reply with one of {known}"))
        end = needs_stop = max(words_end, len(text[: extent.tail].rstrip()))
    inside = islice(runs, bisect_right(runs, start, key=END), bisect_left(runs, max(end, extent.own_end), key=START))
    if any(run.is_own and run.message != index for run in inside):
        raise TemplateError(f"the chat template mixes message {index + 1}, a reply, with another message")
    return Reply(start, max(start, end), notes, needs_stop)


def _start(text: str, extent: Extent, index: int, prompts: Given, stops: Sequence[str]) -> tuple[int, str]:
    """Where the model takes over, and a status if the text before it is not exactly its prompt."""
    end_of_prompt = prompts.end_of_prompt(index)
    if end_of_prompt is not None and end_of_prompt <= extent.last:
        return end_of_prompt, ""
    generation_prompt = prompts.generation_prompt(index)
    if generation_prompt is None:
        # Nothing to compare with: all before the message's own words is its header.
        return extent.own_start, PROMPT_MISMATCH
    place = text.find(generation_prompt, extent.first, extent.last)
    if 0 <= place <= extent.own_start:
        return place + len(generation_prompt), PROMPT_MISMATCH if prompts.given(index) is None else HISTORY_DIFFERS
    # Where the two part. What the message says itself, and the token that ends it, are never part of a prompt.
    stop_starts = (text.find(stop, extent.first, extent.last) for stop in stops if stop)
    limit = min([extent.own_start, *(place for place in stop_starts if place >= 0)])
    pairs = zip(generation_prompt, text[extent.first : limit], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return _out_of_tag_or_word(text, extent.first, extent.first + shared), PROMPT_MISMATCH


def _out_of_tag_or_word(text: str, first: int, place: int) -> int:
    """The last place up to `place` that is not inside a tag, as `<think>` and `<tool_call>` share `<t`, or a word."""
    for opening, closing in ("<>", "[]"):
        if (opened := text.rfind(opening, first, place)) > text.rfind(closing, first, place):
            place = opened
    while first < place < len(text) and text[place - 1].isalnum() and text[place].isalnum():
        place -= 1
    return place


def _through_stop_token(text: str, start: int, tail: int, limit: int, stops: Sequence[str]) -> int | None:
    """Where the first stop token from `start` on ends: one in the message's own tail, or right behind it."""
    places = [(place, -len(stop)) for stop in stops if stop and (place := text.find(stop, start, limit)) >= 0]
    if not places:
        return None
    place, length = min(places)  # of two that start together, the longer
    return place - length if place < tail or not text[tail:place].strip() else None


def _control_token(
    text: str, start: int, tail: int, limit: int, control_tokens: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """The first special token that the template writes behind the reply, if it stands where a stop token would."""
    behind = ((first, last) for first, last in control_tokens if first >= start and last <= limit)
    found = next(behind, None)
    return found if found and (found[0] < tail or not text[tail : found[0]].strip()) else None
