"""Rows → conversations: one function a layout, and the table that finds the right one.

A new layout: one function that turns a row into a Conversation, and its line in LAYOUTS.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_sft.data.conversation import ROLES, Conversation, Message
from lora_sft.data.problems import Problem, RowError
from lora_sft.data.sources import Row
from lora_sft.errors import DataError, SettingError

IGNORED = -100
"""Label of a token that is not learned, in rows that bring their own; the same number as in `chat`."""


@dataclass(frozen=True)
class Reading:
    """How rows are to be read, where they do not tell it themselves.

    Attributes:
        layout: the name of one in LAYOUTS; None finds it out, row by row.
        columns: {our name of a column: the data's}, for rows that call their columns otherwise.
        roles: {the data's name of a speaker: ours}.
    """

    layout: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {layout.name for layout in LAYOUTS}
        if self.layout is not None and self.layout not in known:
            raise SettingError(f"layout {self.layout!r} is not one of {', '.join(sorted(known))}")
        if odd := [name for name in self.columns if name not in COLUMNS]:
            raise SettingError(f"columns: {', '.join(odd)} is not one of our columns; use {', '.join(COLUMNS)}")
        if odd := [role for role in self.roles.values() if role not in ROLES]:
            raise SettingError(f"roles: {', '.join(odd)} is not a role; use {', '.join(ROLES)}")


@dataclass(frozen=True)
class Place:
    """Where in a row something stands."""

    source: str
    field: str = ""

    def at(self, step: str) -> "Place":
        """A place inside this one: `.role`, `[3]`."""
        return Place(self.source, (self.field + step).removeprefix("."))

    def wrong(self, problem: str, fix: str = "") -> RowError:
        """The error that something is wrong here."""
        return RowError(Problem(self.source, self.field, problem, fix))


@dataclass(frozen=True)
class Layout:
    """A way in which people write conversations down.

    Attributes:
        name: for the setting `layout`.
        columns: what a row of it has.
        others: what it may have.
        convert: (row, its place, how to read it) → Conversation.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[dict[str, Any], Place, Reading], Conversation]
    others: tuple[str, ...] = ("system", "tools", "functions")

    def fits(self, value: Mapping[str, Any]) -> bool:
        """Whether a row has its columns."""
        return all(value.get(column) is not None for column in self.columns)


def to_conversations(rows: Iterable[Row], reading: Reading | None = None) -> list[Conversation]:
    """Rows → conversations, in order.

    Raises:
        DataError: no rows, or rows that are no conversations (the first ten, each with its source).
    """
    conversations, problems = [], []
    for row in rows:
        try:
            conversations.append(to_conversation(row, reading))
        except RowError as error:
            problems.append(str(error))
    if problems:
        rest = [f"… and {len(problems) - 10} more rows"] if len(problems) > 10 else []
        raise DataError.of([*problems[:10], *rest])
    if not conversations:
        raise DataError("the dataset is empty: there is nothing to learn from")
    return conversations


def to_conversation(row: Row, reading: Reading | None = None) -> Conversation:
    """One row → Conversation.

    Raises:
        RowError: the row cannot be read, has no known layout, an unknown role, or no assistant turn.
    """
    reading, place = reading or Reading(), Place(row.source)
    if row.problem:
        raise RowError(row.problem)
    if not isinstance(row.value, dict):
        raise place.wrong(f"is {_kind(row.value)}, not an object", _accepted())
    value = row.value | {ours: row.value[theirs] for ours, theirs in reading.columns.items() if theirs in row.value}
    for layout in LAYOUTS:
        if layout.name == reading.layout or (reading.layout is None and layout.fits(value)):
            if missing := [column for column in layout.columns if value.get(column) is None]:
                raise place.wrong(f"lacks {', '.join(missing)} of the layout {layout.name}", _keys(value))
            conversation = replace(layout.convert(value, place, reading), layout=layout.name)
            _check_replies(conversation, place)
            return conversation
    raise place.wrong(f"has no known layout: {_keys(value)}", f"{_accepted()}; or name its columns: {_columns(value)}")


def unused_columns(value: Mapping[str, Any], layout: str, reading: Reading | None = None) -> list[str]:
    """The columns of a row of that layout of which nothing was made."""
    found = next(one for one in LAYOUTS if one.name == layout)
    renamed = reading.columns.values() if reading else ()
    return [str(name) for name in value if name not in (*found.columns, *found.others, *renamed)]


def _columns(value: Mapping[str, Any]) -> str:
    """A guess at what the setting `columns` might say."""
    texts = [str(name) for name, item in value.items() if isinstance(item, str)]
    question, answer = texts if len(texts) == 2 else ("THEIRS", "THEIRS")
    return f"columns: {{prompt: {question}, completion: {answer}}}"


def _keys(value: Mapping[str, Any]) -> str:
    return f"it has {', '.join(map(str, value)) or 'no columns'}"


def _accepted() -> str:
    return "use " + ", ".join(f"{layout.name} ({' and '.join(layout.columns)})" for layout in LAYOUTS)


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _check_replies(conversation: Conversation, place: Place) -> None:
    if not conversation.messages:
        return
    replies = [message for message in conversation.messages if message["role"] == "assistant"]
    if not replies:
        raise place.wrong("no assistant turn, so there is nothing to learn", "add a reply, or leave the row out")
    if all(message.get("train") is False for message in replies):
        raise place.wrong("every reply is marked as not learned (weight: 0 or train: false)", "leave the row out")


# --- layouts ------------------------------------------------------------------------------------------------


def _from_messages(value: dict[str, Any], place: Place, reading: Reading) -> Conversation:
    """OpenAI's layout: `messages` of role and content, with `tools`; content may be a list of typed parts."""
    here = place.at(".messages")
    messages = [
        _message(message, here.at(f"[{index}]"), reading)
        for index, message in enumerate(_list(_json(value["messages"], here), here))
    ]
    return Conversation(
        _system(value, place) + messages, _tools(value.get("tools") or value.get("functions"), place), place.source
    )


# ShareGPT's names of the speakers, and those of its many copies → roles.
SPEAKERS = {
    **dict.fromkeys(("system", "system_prompt"), "system"),
    **dict.fromkeys(("human", "user", "User", "Human", "prompter", "instruction"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model", "ai", "Assistant"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call", "function-call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response", "function-response"), "tool"),
}
CALLERS = ("function_call", "tool_call", "function-call")


def _from_sharegpt(value: dict[str, Any], place: Place, reading: Reading) -> Conversation:
    """ShareGPT: `conversations` of from and value, with `system` and `tools` (often JSON in a string)."""
    messages, here = _system(value, place), place.at(".conversations")
    for index, turn in enumerate(_list(_json(value["conversations"], here), here)):
        where = here.at(f"[{index}]")
        if isinstance(turn, dict) and "role" in turn and "from" not in turn:
            messages.append(_message(turn, where, reading))
            continue
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise where.wrong('is not an object with "from" and "value"', "a turn is {from: human, value: text}")
        speaker = turn.get("from")
        role = reading.roles.get(speaker) or SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            fix = f"use {', '.join(SPEAKERS)}, or map it with roles"
            raise where.at(".from").wrong(f'"{speaker}" is not a speaker', fix)
        message: Message = {"role": role, "content": turn["value"]}
        if speaker in CALLERS:
            calls = _json(turn["value"], where.at(".value"))
            calls = calls if isinstance(calls, list) else [calls]
            message |= {"content": "", "tool_calls": [_tool_call(call, where.at(".value")) for call in calls]}
        messages.append(message | _whether_learned(dict(turn), where))
    return Conversation(messages, _tools(value.get("tools") or value.get("functions"), place), place.source)


def _from_alpaca(value: dict[str, Any], place: Place, reading: Reading) -> Conversation:
    """Alpaca: `instruction` and `output`, with `input`, `system` and `history` (pairs of question and answer)."""
    messages = _system(value, place)
    history = value.get("history") or []
    for index, pair in enumerate(_list(history, place.at(".history")) if history else []):
        where = place.at(f".history[{index}]")
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise where.wrong("is not a pair of question and answer", "give [question, answer]")
        messages += [
            {"role": "user", "content": _text(pair[0], where)},
            {"role": "assistant", "content": _text(pair[1], where)},
        ]
    question = _text(value["instruction"], place.at(".instruction"))
    if value.get("input"):
        question += "\n\n" + _text(value["input"], place.at(".input"))
    answer = _text(value["output"], place.at(".output"))
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, _tools(value.get("tools") or value.get("functions"), place), place.source)


def _from_prompt_completion(value: dict[str, Any], place: Place, reading: Reading) -> Conversation:
    """`prompt` and `completion`: text, or messages of which only the completion's are learned."""
    messages = _system(value, place)
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list):
        shown = [_message(m, place.at(f".prompt[{index}]"), reading) for index, m in enumerate(prompt)]
        messages += [m | ({"train": False} if m["role"] == "assistant" else {}) for m in shown]
    else:
        messages.append({"role": "user", "content": _text(prompt, place.at(".prompt"))})
    if isinstance(completion, list):
        messages += [_message(m, place.at(f".completion[{index}]"), reading) for index, m in enumerate(completion)]
    else:
        messages.append({"role": "assistant", "content": _text(completion, place.at(".completion"))})
    return Conversation(messages, _tools(value.get("tools") or value.get("functions"), place), place.source)


def _from_tokens(value: dict[str, Any], place: Place, reading: Reading) -> Conversation:
    """Ready `input_ids`, with `labels` (without them every token is learned)."""
    ids = _numbers(value["input_ids"], place.at(".input_ids"))
    labels = ids if value.get("labels") is None else _numbers(value["labels"], place.at(".labels"))
    if len(labels) != len(ids):
        raise place.at(".labels").wrong(f"has {len(labels)} numbers for {len(ids)} input_ids", "one label a token")
    odd = next((n for n, (i, label) in enumerate(zip(ids, labels, strict=True)) if label not in (i, IGNORED)), None)
    if odd is not None:
        fix = f"a label is the token itself, or {IGNORED} where nothing is learned"
        raise place.at(f".labels[{odd}]").wrong(f"is {labels[odd]} at the token {ids[odd]}", fix)
    return Conversation(source=place.source, input_ids=ids, labels=labels)


def _from_text(value: dict[str, Any], place: Place, reading: Reading) -> Conversation:
    """Plain `text`: no chat template, all of it learned, and the end-of-sequence token behind it."""
    text = _text(value["text"], place.at(".text"))
    if not text.strip():
        raise place.at(".text").wrong("is empty", "leave the row out")
    return Conversation(source=place.source, text=text)


# A new layout: its function above, its line here. The first that fits a row is taken.
LAYOUTS = (
    Layout("messages", ("messages",), _from_messages),
    Layout("sharegpt", ("conversations",), _from_sharegpt),
    Layout("alpaca", ("instruction", "output"), _from_alpaca, ("input", "history", "system", "tools", "functions")),
    Layout("prompt-completion", ("prompt", "completion"), _from_prompt_completion),
    Layout("tokens", ("input_ids",), _from_tokens, ("labels", "attention_mask")),
    Layout("text", ("text",), _from_text, ()),
)
COLUMNS = (
    *dict.fromkeys(c for layout in LAYOUTS for c in layout.columns),
    "system",
    "tools",
    "input",
    "history",
    "labels",
)
"""Our names of columns, for the setting `columns`."""


# --- what the layouts share ---------------------------------------------------------------------------------


def _system(value: dict[str, Any], place: Place) -> list[Message]:
    """A `system` column beside the turns, as their first message."""
    system = value.get("system")
    if system is None or system == "":
        return []
    return [{"role": "system", "content": _text(system, place.at(".system"))}]


def _message(message: Any, place: Place, reading: Reading) -> Message:
    if not isinstance(message, dict) or "role" not in message:
        raise place.wrong('is not an object with "role" and "content"', "a message is {role: user, content: text}")
    role = message["role"]
    role = reading.roles.get(role, role) if isinstance(role, str) else role
    if role == "function":  # the form before tool_calls
        role = "tool"
    if role not in ROLES:
        raise place.at(".role").wrong(f'"{role}" is not a role', f"use {', '.join(ROLES)}, or map it with roles")
    message = {key: item for key, item in message.items() if item is not None} | {"role": role}
    content = message.get("content", "")
    if isinstance(content, list):
        message |= _parts(content, place.at(".content"))
    elif not isinstance(content, str):
        raise place.at(".content").wrong(f"is {_kind(content)}", "give text or a list of parts")
    if "reasoning_content" in message and not isinstance(message["reasoning_content"], str):
        raise place.at(".reasoning_content").wrong(f"is {_kind(message['reasoning_content'])}", "give text")
    if "function_call" in message:
        message["tool_calls"] = [message.pop("function_call")]
    if calls := _json(message.get("tool_calls"), place.at(".tool_calls")):
        here = place.at(".tool_calls")
        message["tool_calls"] = [
            _tool_call(call, here.at(f"[{index}]")) for index, call in enumerate(_list(calls, here))
        ]
    else:
        message.pop("tool_calls", None)
    if role == "assistant" and not {"content", "tool_calls", "reasoning_content"} & set(message):
        raise place.wrong("the assistant says nothing", "a reply has content or tool_calls")
    if role != "assistant" and "content" not in message:
        raise place.wrong(f"has no content, only {', '.join(map(str, message))}", 'give it as "content", if only ""')
    return {"content": "", **message, **_whether_learned(message, place)}


def _whether_learned(message: Message, place: Place) -> Message:
    """`weight: 0` and `train: false` mark a reply that is not learned; there is nothing between yes and no."""
    wishes = [message.pop(key) for key in ("weight", "train", "training", "loss") if message.get(key) is not None]
    if any(not isinstance(wish, (bool, int, float)) or wish not in (0, 1) for wish in wishes):
        raise place.wrong(f"weight or train is {wishes[0]!r}", "a reply is learned (1, true) or not (0, false)")
    return {"train": False} if any(wish == 0 for wish in wishes) else {}


def _parts(parts: list[Any], place: Place) -> Message:
    """Typed parts (text, reasoning, tool_call) → `content`, `reasoning_content`, `tool_calls`."""
    text, reasoning, calls = [], [], []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        kind = kind if isinstance(kind, str) else None
        body = next((part[key] for key in (kind, "value", "text", "content") if key in part), None) if kind else None
        if kind == "text" and isinstance(body, str):
            text.append(body)
        elif kind in ("reasoning", "thinking") and isinstance(body, str):
            reasoning.append(body)
        elif kind in ("tool_call", "function_call") and body is not None:
            calls.append(_tool_call(body, place.at(f"[{index}]")))
        else:
            raise place.at(f"[{index}]").wrong(
                "is not a text, reasoning or tool_call part", "other parts are not learned"
            )
    found: Message = {"content": "".join(text)}
    return (
        found
        | ({"reasoning_content": "".join(reasoning)} if reasoning else {})
        | ({"tool_calls": calls} if calls else {})
    )


def _text(value: Any, place: Place) -> str:
    if not isinstance(value, str):
        raise place.wrong(f"is {_kind(value)}", "give text")
    return value


def _numbers(value: Any, place: Place) -> list[int]:
    value = _json(value, place)
    if not isinstance(value, list) or not value or any(type(number) is not int for number in value):
        raise place.wrong("is not a list of whole numbers", "give token ids")
    if any(number >= 2**31 or (number < 0 and number != IGNORED) for number in value):
        raise place.wrong("holds a number that is no token id", "give token ids")
    return value


def _list(value: Any, place: Place) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise place.wrong("is not a list with something in it", "give a list, or leave the row out")
    return value


def _json(text: Any, place: Place) -> Any:
    """JSON that may have been written into a string."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise place.wrong(f"no valid JSON at column {error.colno}: {error.msg}", IN_A_STRING) from None
    except (RecursionError, ValueError) as error:
        raise place.wrong(f"no valid JSON: {error}", IN_A_STRING) from None


IN_A_STRING = "text stands here where a list or an object is read; it must then be their JSON"


def _tools(tools: Any, place: Place) -> list[dict[str, Any]] | None:
    """Tool schemas → {"type": "function", "function": {...}}, the form that chat templates read."""
    here = place.at(".tools")
    found = _json(tools, here) if tools else None
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise here.wrong("is not a list of function schemas", "give a list, if only of one")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]


def _tool_call(call: Any, place: Place) -> dict[str, Any]:
    """A call → {"type": "function", "function": {"name", "arguments" as an object}}."""
    call = _json(call, place)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise place.wrong('is not a call with "name" and "arguments"', "a call is {name: text, arguments: {…}}")
    extra = {key: call[key] for key in ("id",) if "function" in call and key in call}
    arguments = _json(function.get("arguments", {}), place.at(".arguments"))
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise place.at(".arguments").wrong(f"is {_kind(arguments)}", "arguments are an object")
    return {"type": "function", **extra, "function": {"name": function["name"], "arguments": arguments}}
