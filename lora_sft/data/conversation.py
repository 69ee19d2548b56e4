"""Conversation: messages and tools, as every later stage reads them."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""`role`, `content` (text), and where present `tool_calls`, `reasoning_content`, `name`, `tool_call_id`; `train: False`
marks a reply that is shown to the model but not learned."""

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """One conversation, ready to be rendered; or, if a row brings it, text or tokens that need no rendering.

    Attributes:
        messages: in order; each has a `role` out of ROLES.
        tools: JSON schemas of the functions that the assistant may call, or None.
        source: where it came from, `chats.jsonl:12`.
        text: plain text, all of it learned, instead of messages.
        input_ids: tokens instead of messages, (length).
        labels: with `input_ids`: the same where a token is learned, -100 elsewhere, (length).
        layout: the name of the layout that the row had.
    """

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    source: str = ""
    text: str | None = None
    input_ids: list[int] | None = None
    labels: list[int] | None = None
    layout: str = ""
