"""A conversation → what a person should know of it before it is trained on."""

import math
from collections.abc import Iterator
from typing import Any

from lora_sft.data.conversation import Conversation
from lora_sft.data.problems import Problem


def check_conversation(conversation: Conversation) -> list[Problem]:
    """What is wrong with a conversation that has a layout and known roles.

    Grave: text that no tokenizer takes, replies that say nothing, results of calls that nobody made. Only told: a
    second system prompt, or one that does not come first, as many templates refuse both.
    """
    found = list(_odd_characters(conversation))
    calls = 0
    for index, message in enumerate(conversation.messages):
        role, field = message["role"], f"messages[{index}]"
        if role in ("system", "developer") and index > 0:
            words = (
                "is a second system prompt" if _is_system(conversation, 0) else "is a system prompt behind other turns"
            )
            found.append(Problem(conversation.source, field, words, "many templates refuse it", is_grave=False))
        elif role == "assistant":
            calls += len(message.get("tool_calls") or [])
            if (
                not any(message.get(key) for key in ("tool_calls", "reasoning_content"))
                and not message["content"].strip()
            ):
                learned = message.get("train") is not False
                fix = "the model would learn to say nothing: leave it out, or mark it train: false"
                found.append(Problem(conversation.source, field, "is an empty reply", fix, is_grave=learned))
        elif role == "tool":
            if calls == 0:
                fix = "a tool message follows the tool_calls of a reply"
                found.append(Problem(conversation.source, field, "is the result of a call that nobody made", fix))
            calls = max(0, calls - 1)
    return found


def _is_system(conversation: Conversation, index: int) -> bool:
    return conversation.messages[index]["role"] in ("system", "developer")


def _odd_characters(conversation: Conversation) -> Iterator[Problem]:
    """Lone surrogates, which no tokenizer can read, NULs, which are a sign of a broken file, NaN and infinities."""
    for name, value in (
        ("messages", conversation.messages),
        ("tools", conversation.tools),
        ("text", conversation.text),
    ):
        for field, text in _leaves(value, name):
            if isinstance(text, float):
                if not math.isfinite(text):
                    words = f"is {text}, which JSON does not have"
                    yield Problem(conversation.source, field, words, "give a number or text")
                continue
            if "\0" in text:
                yield Problem(conversation.source, field, "holds a NUL character", "take it out")
            if not text.isascii() and (place := _surrogate(text)) is not None:
                words = f"holds half a character at {place + 1} (a lone surrogate)"
                yield Problem(conversation.source, field, words, "write the whole character")


def _surrogate(text: str) -> int | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _leaves(value: Any, field: str) -> Iterator[tuple[str, str | float]]:
    """(where it stands, itself) of all text and floats in a value, keys included."""
    if isinstance(value, (str, float)):
        yield field, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield field, str(key)
            yield from _leaves(item, f"{field}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{field}[{index}]")
