"""Rendered text → tokens and labels: the value that the trainer learns from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_sft.chat import IGNORED
from lora_sft.chat.rendering import Rendered, render
from lora_sft.chat.turns import Note
from lora_sft.data.conversation import Message
from lora_sft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        input_ids: token ids, (length).
        labels: the same ids where the model must produce them, -100 elsewhere, (length).
        cut: how many tokens `max_length` took away.
        source: where the conversation came from.
        notes: what a person should know, a note a turn at most.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    source: str = ""
    notes: list[Note] = field(default_factory=list)

    @property
    def supervised_tokens(self) -> int:
        """How many tokens are learned. The first token has nothing before it and is never one of them."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    stop_tokens: Sequence[str] | None = None,
    max_length: int | None = None,
    **template_variables: Any,
) -> Example:
    """A conversation → input_ids and labels; the arguments are those of `render`, and `max_length` in tokens.

    Raises:
        TemplateError: as `render`.
        ModelError: the tokenizer cannot say which characters a token stands for.
    """
    return encode_rendered(
        render(messages, tokenizer, tools, chat_template, stop_tokens, **template_variables), tokenizer, max_length
    )


def encode_rendered(
    rendered: Rendered, tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None, source: str = ""
) -> Example:
    """Text with its supervised spans → Example. A token is supervised when all its characters are.

    Special tokens are not added: the template has written them.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for (no offsets); use the "
            "model's fast tokenizer"
        )
    input_ids, labels = _tokens(rendered, tokenizer)
    cut = 0 if max_length is None else max(0, len(input_ids) - max_length)
    kept = len(input_ids) - cut
    return Example(input_ids[:kept], labels[:kept], cut, source, rendered.notes)


def _tokens(rendered: Rendered, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Tokens of the whole text; where one straddles the start of a reply, the text is split there, as in inference."""
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    splits = [start for start, _ in rendered.supervised if any(first < start < last for first, last in offsets)]
    if not splits:
        return encoded["input_ids"], _labels(encoded["input_ids"], offsets, rendered.supervised)
    input_ids: list[int] = []
    labels: list[int] = []
    for begin, end in zip([0, *splits], [*splits, len(rendered.text)], strict=True):
        piece = tokenizer(rendered.text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
        shifted = [(first + begin, last + begin) for first, last in piece["offset_mapping"]]
        input_ids += piece["input_ids"]
        labels += _labels(piece["input_ids"], shifted, rendered.supervised)
    return input_ids, labels


def _labels(
    input_ids: Sequence[int], offsets: Sequence[tuple[int, int]], supervised: Sequence[tuple[int, int]]
) -> list[int]:
    """Both lists are in order of position, so one walk along them is enough."""
    labels, spans = [], iter([*supervised, (float("inf"), float("inf"))])
    start, end = next(spans)
    for token, (first, last) in zip(input_ids, offsets, strict=True):
        while first >= end:
            start, end = next(spans)
        # Some tokenizers report white space as empty, (last, last); it belongs to where it ends.
        labels.append(token if start <= first and start < last <= end else IGNORED)
    return labels
