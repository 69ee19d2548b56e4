"""Rendered text → tokens and labels: the value that the trainer learns from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_sft.chat import IGNORED
from lora_sft.chat.rendering import Rendered, render
from lora_sft.chat.tokens import Tokens, tokenize
from lora_sft.chat.turns import Note
from lora_sft.data.conversation import Message

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
        notes: what a person should know.
        split: how many replies began inside a token of the whole text, and had it split as inference does.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    source: str = ""
    notes: list[Note] = field(default_factory=list)
    split: int = 0

    @property
    def supervised_tokens(self) -> int:
        """How many tokens are learned. The first token has nothing before it and is never one of them."""
        learned = len(self.labels) - self.labels.count(IGNORED)
        return learned - (self.labels[:1] not in ([], [IGNORED]))


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

    Raises:
        ModelError: the tokenizer cannot say which characters a token stands for.
    """
    tokens, labels, split = _labelled(rendered, tokenizer)
    cut = 0 if max_length is None else max(0, len(labels) - max_length)
    kept = len(labels) - cut
    return Example(tokens.ids[:kept], labels[:kept], cut, source, rendered.notes, split)


@dataclass(frozen=True)
class Preview:
    """One conversation as the model sees it, to be looked at.

    Attributes:
        source: where it came from.
        rendered: its text, and what of it must be produced.
        example: its tokens and labels.
        tokens: where each token stands in the text.
        warning: what happens to it in training, if not all of it is learned.
    """

    source: str
    rendered: Rendered
    example: Example
    tokens: Tokens
    warning: str = ""


def look_at(rendered: Rendered, tokenizer: "PreTrainedTokenizerBase", source: str) -> Preview:
    """Text with its supervised spans → Preview, cut to nothing.

    Raises:
        ModelError: the tokenizer cannot say which characters a token stands for.
    """
    tokens, labels, split = _labelled(rendered, tokenizer)
    return Preview(source, rendered, Example(tokens.ids, labels, 0, source, rendered.notes, split), tokens)


def _labelled(rendered: Rendered, tokenizer: "PreTrainedTokenizerBase") -> tuple[Tokens, list[int], int]:
    """(tokens, their labels, how many tokens were split).

    Where a token straddles the start of a reply, the text is split there, as in inference.
    """
    if tokenizer.is_fast:
        tokens = tokenize(rendered.text, tokenizer, rendered.literal)
        splits = [start for start, _ in rendered.supervised if tokens.straddle(start)]
        if splits:
            tokens = tokenize(rendered.text, tokenizer, rendered.literal, splits)
    else:
        splits = []
        borders = [place for span in rendered.supervised for place in span]
        tokens = tokenize(rendered.text, tokenizer, rendered.literal, borders)
    labels = [IGNORED] * len(tokens.ids)
    for start, end in rendered.supervised:
        first, last = tokens.inside(start, end)
        labels[first:last] = tokens.ids[first:last]
    return tokens, labels, len(splits)
