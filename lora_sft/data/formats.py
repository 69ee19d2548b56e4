"""Rows → conversations: one function a layout, and the table that finds the right one.

A new layout: one function that turns a row into a Conversation, and its line in LAYOUTS.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lora_sft.data.conversation import ROLES, Conversation, Message
from lora_sft.data.sources import Row
from lora_sft.errors import DataError


@dataclass(frozen=True)
class Layout:
    """A way in which people write conversations down."""

    name: str
    column: str
    convert: Callable[[dict[str, Any], str], Conversation]


def to_conversations(rows: Iterable[Row]) -> list[Conversation]:
    """Rows → conversations, in order.

    Raises:
        DataError: no rows, or rows that are no conversations (the first ten, each with its source).
    """
    conversations, problems = [], []
    for row in rows:
        try:
            conversations.append(to_conversation(row))
        except DataError as error:
            problems.append(str(error))
    if problems:
        rest = [f"… and {len(problems) - 10} more rows"] if len(problems) > 10 else []
        raise DataError.of([*problems[:10], *rest])
    if not conversations:
        raise DataError("the dataset is empty: there is nothing to learn from")
    return conversations


def to_conversation(row: Row) -> Conversation:
    """One row → Conversation.

    Raises:
        DataError: the row has no known layout, an unknown role, or no assistant turn.
    """
    if not isinstance(row.value, dict):
        raise DataError(f"{row.source}: is {type(row.value).__name__}, not an object with one of the keys {_columns()}")
    for layout in LAYOUTS:
        if row.value.get(layout.column) is not None:
            conversation = layout.convert(row.value, row.source)
            _check(conversation)
            return conversation
    raise DataError(
        f"{row.source}: has the keys {', '.join(map(str, row.value)) or '(none)'}, but a conversation stands under "
        f"{_columns()}"
    )


def _columns() -> str:
    return " or ".join(f'"{layout.column}" ({layout.name})' for layout in LAYOUTS)


def _check(conversation: Conversation) -> None:
    replies = [message for message in conversation.messages if message["role"] == "assistant"]
    if not replies:
        raise DataError(f"{conversation.source}: no assistant turn, so there is nothing to learn")
    if all(message.get("train") is False for message in replies):
        raise DataError(f"{conversation.source}: every reply is marked as not learned (weight: 0 or train: false)")


# --- layouts ------------------------------------------------------------------------------------------------


def _from_messages(value: dict[str, Any], source: str) -> Conversation:
    """OpenAI's layout: `messages` of role and content, with `tools`; content may be a list of typed parts."""
    messages = [
        _message(message, f"{source}: messages[{index}]")
        for index, message in enumerate(_list(_json(value["messages"], source), f"{source}: messages"))
    ]
    return Conversation(_system(value) + messages, _tools(value.get("tools"), source), source)


def _system(value: dict[str, Any]) -> list[Message]:
    """A `system` column beside the turns, as their first message."""
    return [{"role": "system", "content": value["system"]}] if isinstance(value.get("system"), str) else []


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or "role" not in message:
        raise DataError(f'{where}: is not an object with "role" and "content"')
    if message["role"] not in ROLES:
        raise DataError(f'{where}.role: "{message["role"]}" is not a role; use {", ".join(ROLES)}')
    message = {key: item for key, item in message.items() if item is not None}
    content = message.get("content", "")
    if isinstance(content, list):
        message |= _parts(content, where)
    elif not isinstance(content, str):
        raise DataError(f"{where}.content: is {type(content).__name__}, not text or a list of parts")
    if "function_call" in message:  # the form before tool_calls
        message["tool_calls"] = [message.pop("function_call")]
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{index}]")
            for index, call in enumerate(_list(calls, f"{where}.tool_calls"))
        ]
    if message["role"] == "assistant" and not {"content", "tool_calls", "reasoning_content"} & set(message):
        raise DataError(f"{where}: the assistant says nothing: no content and no tool_calls")
    return {"content": "", **message, **_whether_learned(message, where)}


def _whether_learned(message: Message, where: str) -> Message:
    """`weight: 0` and `train: false` mark a reply that is not learned; there is nothing between yes and no."""
    wishes = [message.pop(key) for key in ("weight", "train", "training") if key in message]
    if any(wish not in (0, 1) for wish in wishes):
        raise DataError(f"{where}: weight or train is {wishes[0]!r}; a reply is learned (1, true) or not (0, false)")
    return {"train": False} if any(wish == 0 for wish in wishes) else {}


def _parts(parts: list[Any], where: str) -> Message:
    """Typed parts (text, reasoning, tool_call) → `content`, `reasoning_content`, `tool_calls`."""
    text, reasoning, calls = [], [], []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        body = next((part[key] for key in (kind, "value", "text", "content") if key in part), None) if kind else None
        if kind == "text" and isinstance(body, str):
            text.append(body)
        elif kind in ("reasoning", "thinking") and isinstance(body, str):
            reasoning.append(body)
        elif kind in ("tool_call", "function_call") and body is not None:
            calls.append(_tool_call(body, f"{where}.content[{index}]"))
        else:
            raise DataError(f"{where}.content[{index}]: is not a text, reasoning or tool_call part")
    found: Message = {"content": "".join(text)}
    return (
        found
        | ({"reasoning_content": "".join(reasoning)} if reasoning else {})
        | ({"tool_calls": calls} if calls else {})
    )


# ShareGPT's names of the speakers → roles.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}


def _from_sharegpt(value: dict[str, Any], source: str) -> Conversation:
    """ShareGPT: `conversations` of from and value, with `system` and `tools` (often JSON in a string)."""
    messages = _system(value)
    for index, turn in enumerate(_list(_json(value["conversations"], source), f"{source}: conversations")):
        where = f"{source}: conversations[{index}]"
        if isinstance(turn, dict) and "role" in turn:
            messages.append(_message(turn, where))
            continue
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f'{where}: is not an object with "from" and "value"')
        if turn.get("from") not in SPEAKERS:
            raise DataError(f'{where}.from: "{turn.get("from")}" is not a speaker; use {", ".join(SPEAKERS)}')
        content: Message = {"content": turn["value"]}
        if turn["from"] == "function_call":
            calls = _json(turn["value"], where)
            content = {
                "content": "",
                "tool_calls": [_tool_call(call, where) for call in (calls if isinstance(calls, list) else [calls])],
            }
        messages.append({"role": SPEAKERS[turn["from"]], **content})
    return Conversation(messages, _tools(value.get("tools"), source), source)


# A new layout: its function above, its line here.
LAYOUTS = (
    Layout("OpenAI messages", "messages", _from_messages),
    Layout("ShareGPT", "conversations", _from_sharegpt),
)


# --- what the layouts share ---------------------------------------------------------------------------------


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: is not a list with something in it")
    return value


def _json(text: Any, where: str) -> Any:
    """JSON that may have been written into a string."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no valid JSON at column {error.colno}: {error.msg}") from None


def _tools(tools: Any, source: str) -> list[dict[str, Any]] | None:
    """Tool schemas → {"type": "function", "function": {...}}, the form that chat templates read."""
    found = _json(tools, f"{source}: tools") if tools else None
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise DataError(f"{source}: tools is not a list of function schemas")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call → {"type": "function", "function": {"name", "arguments" as an object}}."""
    call = _json(call, where)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f'{where}: is not a call with "name" and "arguments"')
    extra = {key: call[key] for key in ("id",) if "function" in call and key in call}
    arguments = _json(function.get("arguments", {}), f"{where}.arguments")
    return {"type": "function", **extra, "function": {"name": function["name"], "arguments": arguments}}
