"""Messages → text, and for every character whether the model must produce it.

The model must produce an assistant turn through its first stop token, and nothing else. Which characters those are is
traced through the rendering itself (`tracing.py`, `turns.py`), so that it holds for any template: there are no marker
strings to be fooled and no table of model families.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sft.chat.traced import Traced
from lora_sft.chat.tracing import compile_traced
from lora_sft.chat.turns import REASONING_FIELDS, Note, Prompt, extents_of, find_reply, what_is_missing
from lora_sft.data.conversation import Message
from lora_sft.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        TemplateError: no template, one that fails on these messages, or one that cannot be traced.
    """
    template = chat_template or plain_template(tokenizer)
    stops = stop_tokens_of(tokenizer) if stop_tokens is None else list(stop_tokens)
    variables = {"documents": None, **tokenizer.special_tokens_map, **template_variables}
    variables |= {"tools": list(tools) if tools else None}
    text = _traced(template, messages, variables)
    prompt = _prompts(template, messages, variables)
    extents = extents_of(text)
    supervised, notes = [], []
    replies = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    for turn, index in enumerate(replies):
        start, end, found = find_reply(text, extents, index, prompt, stops)
        if messages[index].get("train") is False:
            continue
        if missing := what_is_missing(messages[index], text[extents[index].first : end], template):
            found.append(missing)
        notes += [Note(turn, status, words) for status, words in found]
        if end > start:
            supervised.append((start, end))
    return Rendered("".join(text), supervised, notes)


def _traced(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> Traced:
    """The text with its origins; it must be the text that transformers renders, character for character."""
    from jinja2 import TemplateError as JinjaError

    variables = {**variables, "add_generation_prompt": False}
    try:
        compiled = compile_traced(template)
        plain = compiled.plain_text(with_aliases(messages), variables)
        text = compiled.render(with_aliases(messages), variables)
    except (JinjaError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise TemplateError(f"the chat template fails on this conversation: {error}") from None
    if text != plain:
        raise TemplateError(
            "the chat template does something with the messages that cannot be traced, so what the assistant says "
            "cannot be told from the rest; choose another with chat_template (`lora-sft templates` lists ours)"
        )
    return text


def _prompts(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> Prompt:
    """Renders the first messages as the model is given them, each at most once."""
    from jinja2 import TemplateError as JinjaError

    compiled = compile_traced(template)

    @cache
    def prompt(count: int, with_generation_prompt: bool) -> str | None:
        try:
            some = with_aliases(messages[:count])
            return compiled.plain_text(some, {**variables, "add_generation_prompt": with_generation_prompt})
        except (JinjaError, TypeError, ValueError, KeyError, AttributeError):
            return None  # many templates refuse a conversation without a question

    return prompt


def with_aliases(messages: Sequence[Message]) -> list[Message]:
    """Messages as transformers hands them to a template: reasoning under each of the names that templates read.

    Source: `_alias_reasoning_fields` and `_plain_template_data` in transformers 5.23.
    """
    aliased = []
    for message in messages:
        reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
        shown = {key: value for key, value in message.items() if key != "train"}
        if reasoning is not None:
            shown = {"thinking": reasoning, **shown, "reasoning_content": reasoning}
        aliased.append(shown)
    return aliased


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
