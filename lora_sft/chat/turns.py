"""Traced text → where each reply starts and ends, and what a person should know of it.

For assistant turn i the model is given P = the messages before it, rendered with the generation prompt. It must
produce everything after that, through the first stop token behind the message's own last character.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from lora_sft.chat.traced import NOBODY, Traced
from lora_sft.data.conversation import Message
from lora_sft.errors import TemplateError

# What a note says, from harmless to harmful; the last two stop a run.
HISTORY_DIFFERS = "history differs"
PROMPT_MISMATCH = "prompt mismatch"
REWRITTEN = "rewritten"
DROPPED = "dropped"
NO_STOP_TOKEN = "no stop token"
HARMFUL = (DROPPED, NO_STOP_TOKEN)

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

Prompt = Callable[[int, bool], str | None]
"""(how many messages, with the generation prompt) → their text; None if the template refuses them."""


class Note(NamedTuple):
    """What a person should know of one assistant turn (counted from 0)."""

    turn: int
    status: str
    words: str


@dataclass(frozen=True)
class Extent:
    """Where a message stands in the text: its first and last character, and the end of its own last word.

    Attributes:
        first, last: offsets of the first and behind the last character written for it.
        own_end: offset behind the last character of its own words; `first` if there are none.
    """

    first: int
    last: int
    own_end: int


def extents_of(text: Traced) -> dict[int, Extent]:
    """{index of a message: its extent}, in one walk over the text."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    own_end: dict[int, int] = {}
    for position, origin in enumerate(text.origins):
        if origin == NOBODY:
            continue
        index, is_own = divmod(origin, 2)
        first.setdefault(index, position)
        last[index] = position + 1
        if is_own:
            own_end[index] = position + 1
    return {index: Extent(first[index], last[index], own_end.get(index, first[index])) for index in first}


def find_reply(
    text: Traced, extents: dict[int, Extent], index: int, prompt: Prompt, stops: Sequence[str]
) -> tuple[int, int, list[tuple[str, str]]]:
    """(start, end, [(status, words)]) of the reply that stands at `index` among the messages.

    Raises:
        TemplateError: the template writes nothing for it, or mixes it with another message.
    """
    extent = extents.get(index)
    if extent is None:
        raise TemplateError(f"the chat template writes nothing for message {index + 1}, a reply")
    notes: list[tuple[str, str]] = []
    start, status = _start(text, extent, index, prompt, stops)
    if status == PROMPT_MISMATCH:
        notes.append((status, "the prompt that comes before this reply in use is not what stands before it here"))
    elif status:
        notes.append((status, "earlier turns are rendered otherwise when the reply is still to come"))
    end = _through_stop_token(text, max(start, extent.own_end), _next_own_words(text, extent.last), stops)
    if end is None:
        known = ", ".join(stops) or "(no stop token known)"
        notes.append((NO_STOP_TOKEN, f"the template does not end the reply with one of {known}"))
        end = extent.last
    if any(origin // 2 != index and origin % 2 for origin in text.origins[start:end] if origin != NOBODY):
        raise TemplateError(f"the chat template mixes message {index + 1}, a reply, with another message")
    return start, max(start, end), notes


def _start(text: Traced, extent: Extent, index: int, prompt: Prompt, stops: Sequence[str]) -> tuple[int, str]:
    """Where the model takes over, and a status if the text before it is not exactly its prompt."""
    given = prompt(index, True)
    if given is not None and text.startswith(given) and len(given) <= extent.last:
        return len(given), ""
    before = prompt(index, False)
    known = given is not None and before is not None and given.startswith(before)
    generation_prompt = given[len(before) :] if known and given is not None and before is not None else ""
    own_start = next((p for p in range(extent.first, extent.last) if text.origins[p] == 2 * index + 1), extent.last)
    if not generation_prompt:
        return own_start, PROMPT_MISMATCH  # nothing to compare with: all before the message's own words is its header
    if (place := text.find(generation_prompt, extent.first, own_start)) >= 0:
        return place + len(generation_prompt), HISTORY_DIFFERS
    # Where the two part. What the message says itself, and the token that ends it, are never part of a prompt.
    stop_starts = (text.find(stop, extent.first) for stop in stops if stop)
    limit = min([own_start, *(place for place in stop_starts if place >= 0)])
    pairs = zip(generation_prompt, text[extent.first : limit], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return extent.first + shared, PROMPT_MISMATCH


def _next_own_words(text: Traced, position: int) -> int:
    """Where the own words of a later message begin; the end of the text if nowhere."""
    return next((p for p in range(position, len(text)) if text.origins[p] != NOBODY and text.origins[p] % 2), len(text))


def _through_stop_token(text: str, start: int, limit: int, stops: Sequence[str]) -> int | None:
    """Where the first stop token from `start` on ends, if it does so before `limit`."""
    places = [(text.find(stop, start, limit), len(stop)) for stop in stops if stop]
    found = min((place for place in places if place[0] >= 0), default=None)
    return found[0] + found[1] if found else None


def what_is_missing(reply: Message, written: str, template: str) -> tuple[str, str] | None:
    """(status, words) if the template left out something of a reply: its words, its reasoning or one of its calls.

    A template that knows of reasoning may leave it out of earlier turns; one that does not know of it drops it.
    """
    if reply.get("reasoning_content") and not any(name in template for name in REASONING_FIELDS):
        return DROPPED, "the template leaves out its reasoning"
    words = (reply.get("content") or "").strip()
    if isinstance(words, str) and words not in written:
        thought, _, answer = words.rpartition("</think>")
        if thought and answer.strip() in written:
            return REWRITTEN, "the template leaves its thoughts out of an earlier turn"
        return DROPPED, "the template leaves out what the assistant says"
    calls = [call["function"]["name"] for call in reply.get("tool_calls") or []]
    lost = next((name for name in calls if name not in written), None)
    return (DROPPED, f"the template leaves out the call of {lost}") if lost else None
