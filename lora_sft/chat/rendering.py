"""Messages → text, and for every character whether the model must produce it.

The model must produce an assistant turn through its first stop token, and nothing else. Which characters are the
assistant's is read from the template's `{% generation %}` blocks; a template without them is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_sft.data.conversation import Message
from lora_sft.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_STOP_TOKEN = "no stop token"
DROPPED = "dropped"
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class Note(NamedTuple):
    """What a person should know of one assistant turn (counted from 0)."""

    turn: int
    status: str
    words: str


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it.

    Attributes:
        text: the whole conversation.
        supervised: [(start, end)], character offsets into `text`, of what the model must produce.
        notes: what a person should know.
    """

    text: str
    supervised: list[tuple[int, int]]
    notes: list[Note] = field(default_factory=list)


def render(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    stop_tokens: Sequence[str] | None = None,
    **template_variables: Any,
) -> Rendered:
    """A conversation → its text, with the characters marked that the model must produce.

    Args:
        messages: role and content, in order.
        tokenizer: gives the special tokens, and the chat template unless one is named.
        tools: JSON schemas of functions that the assistant may call.
        chat_template: Jinja source; None takes the tokenizer's.
        stop_tokens: tokens that end a reply; None takes the tokenizer's eos and the generation config beside it.
        template_variables: passed to the template (`enable_thinking=False`).

    Raises:
        TemplateError: no template, one without `{% generation %}` blocks, or one that fails on these messages.
    """
    from jinja2 import TemplateError as JinjaError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat_template or plain_template(tokenizer)
    check_marks(template)
    variables = {**tokenizer.special_tokens_map, **template_variables}
    try:
        texts, blocks = render_jinja_template(
            [list(messages)],
            tools=list(tools) if tools else None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **variables,
        )
    except (JinjaError, TypeError, ValueError, KeyError) as error:
        raise TemplateError(f"the chat template fails on this conversation: {error}") from None
    stops = stop_tokens_of(tokenizer) if stop_tokens is None else list(stop_tokens)
    replies = [message for message in messages if message.get("role") == "assistant"]
    if len(blocks[0]) != len(replies):
        raise TemplateError(
            f"the chat template marks {len(blocks[0])} replies in a conversation that has {len(replies)}"
        )
    supervised, notes = [], []
    for turn, ((start, end), reply) in enumerate(zip(blocks[0], replies, strict=True)):
        stop = _through_stop_token(texts[0], start, end, stops)
        if stop is None:
            notes.append(
                Note(
                    turn,
                    NO_STOP_TOKEN,
                    f"the template does not end the reply with one of {', '.join(stops) or '(no stop token known)'}",
                )
            )
        if reply.get("train") is False:
            continue
        if missing := _missing(reply, texts[0][start:end], template):
            notes.append(Note(turn, DROPPED, f"the template leaves out {missing}"))
        if (stop or end) > start:
            supervised.append((start, stop or end))
    return Rendered(texts[0], supervised, notes)


def plain_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's own chat template; of several, the one called default.

    Raises:
        TemplateError: it has none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise TemplateError(
            "the model has no chat template; choose one with chat_template (`lora-sft templates` lists them)"
        )
    return str(template)


def check_marks(template: str) -> None:
    """Raises TemplateError if the template does not say which part of it is the assistant's."""
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise TemplateError(
            "the chat template has no {% generation %} blocks, so what the assistant says cannot be told from the "
            "rest; "
            "name one that has them with chat_template (`lora-sft templates` lists ours), or mark the assistant's "
            "part in a copy of this one"
        )


def stop_tokens_of(tokenizer: "PreTrainedTokenizerBase", eos_token_id: int | list[int] | None = None) -> list[str]:
    """The tokens that end a reply: the tokenizer's eos, and those of the model's generation config.

    Args:
        eos_token_id: of the generation config; None reads the one that lies beside the tokenizer, if it was
            loaded from a folder.
    """
    if eos_token_id is None:
        beside = Path(str(tokenizer.name_or_path)) / "generation_config.json"
        if beside.is_file():
            import json

            eos_token_id = json.loads(beside.read_text(encoding="utf-8")).get("eos_token_id")
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    known = [tokenizer.convert_ids_to_tokens(token_id) for token_id in ids]
    eos = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    return list(dict.fromkeys([*eos, *(token for token in known if isinstance(token, str))]))


def _missing(reply: Message, block: str, template: str) -> str | None:
    """What of a reply the template did not write: its words, its reasoning or one of its calls.

    A template that knows of reasoning may leave it out of earlier turns; one that does not know of it drops it.
    """
    if reply.get("reasoning_content") and not any(name in template for name in REASONING_FIELDS):
        return "its reasoning"
    if (reply.get("content") or "").strip() not in block:
        return "what the assistant says"
    calls = [call["function"]["name"] for call in reply.get("tool_calls") or []]
    return next((f"the call of {name}" for name in calls if name not in block), None)


def _through_stop_token(text: str, start: int, end: int, stops: Sequence[str]) -> int | None:
    """Where the first stop token after the reply ends: in the block's tail or right behind it; None if nowhere."""
    body, found = text[start:end].rstrip(), None
    while last := next((stop for stop in stops if body.endswith(stop)), None):
        found = start + len(body)
        body = body[: -len(last)].rstrip()
    if found is None:
        behind = next((stop for stop in stops if text.startswith(stop, end)), None)
        found = end + len(behind) if behind else None
    return found
