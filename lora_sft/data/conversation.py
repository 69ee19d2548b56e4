"""Conversation: messages and tools, as every later stage reads them."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""`role`, `content` (text), and where present `tool_calls`, `reasoning_content`, `name`, `tool_call_id`; `train: False`
marks a reply that is shown to the model but not learned."""

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """One conversation, ready to be rendered.

    Attributes:
        messages: in order; each has a `role` out of ROLES.
        tools: JSON schemas of the functions that the assistant may call, or None.
        source: where it came from, `chats.jsonl:12`.
    """

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    source: str = ""
