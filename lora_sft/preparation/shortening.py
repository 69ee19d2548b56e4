"""A conversation that is too long → the same without some of its turns, cut only between them."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from typing import Literal

from lora_sft.data.conversation import Conversation, Message


def shortened(
    conversation: Conversation, which: Literal["oldest", "newest"], fits: Callable[[Conversation], bool]
) -> Conversation | None:
    """The longest that fits; None if nothing does.

    A turn is a question with all that answers it; system prompts at the beginning stay.

    Args:
        which: are left out: the `oldest` turns or the `newest`.
        fits: whether a conversation is short enough, and something is learned in it. What is part of a conversation
            that fits is taken to fit.
    """
    system, groups = _turns(conversation.messages)

    def without(count: int) -> Conversation:
        kept = groups[count:] if which == "oldest" else groups[: len(groups) - count]
        return replace(conversation, messages=system + [message for group in kept for message in group])

    count = bisect_left(range(1, len(groups)), True, key=lambda count: fits(without(count))) + 1
    return without(count) if count < len(groups) else None


def _turns(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """(the system prompts at the beginning, the turns)."""
    system = list(takewhile(lambda message: message["role"] in ("system", "developer"), messages))
    groups: list[list[Message]] = []
    for message in messages[len(system) :]:
        if message["role"] == "user" or not groups:
            groups.append([])
        groups[-1].append(message)
    return system, groups
