"""A reply and what was written for it → what the template left out."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from lora_sft.chat.turns import DROPPED, REWRITTEN
from lora_sft.data.conversation import Message

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def what_is_missing(reply: Message, written: str, when_last: Callable[[], str | None]) -> tuple[str, str] | None:
    """(status, words) if the template left out something of a reply: its words, its reasoning or one of its calls.

    Args:
        written: what it wrote for the reply, with what a generation prompt may have put before it.
        when_last: the same when no message comes behind the reply; None if it cannot be had. What is only left
            out later, as reasoning often is, is rewritten and not dropped.
    """
    lost = next((name for name, words in _said(reply) if not _stands_in(words, written)), None)
    if lost is None:
        return None
    alone = when_last()
    if alone is not None and all(_stands_in(words, alone) for _, words in _said(reply)):
        return REWRITTEN, f"the template leaves out {lost} once another message follows"
    return DROPPED, f"the template leaves out {lost}"


def words_of(content: Any) -> str:
    """The text of a message's content, which may be a list of typed parts."""
    if isinstance(content, str):
        return content
    return "".join(_text_parts(content))


def _text_parts(content: Any) -> Iterator[str]:
    for part in content if isinstance(content, (list, tuple)) else ():
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            yield part["text"]


def _said(reply: Message) -> Iterator[tuple[str, str]]:
    """(its name, the text) of all that a reply says."""
    reasoning = next((reply[name] for name in REASONING_FIELDS if isinstance(reply.get(name), str)), "")
    yield "its reasoning", reasoning
    content = reply.get("content")
    thought, end_of_thought, answer = content.rpartition("</think>") if isinstance(content, str) else ("", "", "")
    if end_of_thought:
        yield "its thoughts", thought.rpartition("<think>")[2]
        yield "what the assistant says", answer
    else:
        for part in [content] if isinstance(content, str) else _text_parts(content):
            yield "what the assistant says", part
    for call in reply.get("tool_calls") or []:
        function = call.get("function", call)
        yield f"the call of {function['name']}", function["name"]
        for argument in _leaves(function.get("arguments")):
            yield f"an argument of the call of {function['name']}", argument


def _leaves(value: Any) -> Iterator[str]:
    """All text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)


def _stands_in(words: str, written: str) -> bool:
    """Whether words were written, as they are or as JSON escapes them."""
    words = words.strip()
    return words in written or any(json.dumps(words, ensure_ascii=ascii)[1:-1] in written for ascii in (False, True))
