"""Conversations → examples ready to train on, with every row accounted for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_sft.chat.labels import Example, encode_rendered
from lora_sft.chat.rendering import Rendered, render
from lora_sft.chat.turns import HARMFUL
from lora_sft.data.conversation import Conversation
from lora_sft.errors import DataError, TemplateError
from lora_sft.model.tokenizer import Speech


@dataclass(frozen=True)
class Prepared:
    """Examples, and what became of the conversations that are not among them.

    Attributes:
        examples: in the order of the data.
        too_long: sources of the rows dropped because they exceed `max_length`.
        without_reply: sources of the rows dropped because no supervised token is left in them.
        cut: how many rows lost their end.
        first: the first example as text, to be looked at.
        noted: {status: a line a reply} of what a person should know, though it is learned as it stands.
    """

    examples: list[Example]
    too_long: list[str]
    without_reply: list[str]
    cut: int
    first: Rendered
    noted: dict[str, list[str]]

    @property
    def tokens(self) -> int:
        """All tokens, supervised or not."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that are learned."""
        return sum(example.supervised_tokens for example in self.examples)


def render_all(
    conversations: Sequence[Conversation], speech: Speech, variables: dict[str, Any]
) -> Iterator[tuple[Conversation, Rendered]]:
    """Each conversation with its rendering.

    Raises:
        TemplateError: names the row on which the template fails.
    """
    for conversation in conversations:
        try:
            yield (
                conversation,
                render(
                    conversation.messages,
                    speech.tokenizer,
                    conversation.tools,
                    stop_tokens=speech.stop_tokens,
                    **variables,
                ),
            )
        except TemplateError as error:
            raise TemplateError(f"{conversation.source}: {error}") from None


def prepare(
    conversations: Sequence[Conversation],
    speech: Speech,
    max_length: int,
    truncation: str = "drop",
    variables: dict[str, Any] | None = None,
) -> Prepared:
    """Conversations → Prepared.

    Args:
        max_length: in tokens.
        truncation: what happens to longer rows: `drop`, `cut` (the end is lost, and with it the stop token) or `error`.
        variables: for the chat template.

    Raises:
        TemplateError: the template leaves something out, or ends a reply without a stop token.
        DataError: rows are too long and `truncation` is `error`, or nothing is left to learn.
    """
    examples: list[Example] = []
    noted: dict[str, list[str]] = {}
    too_long, without_reply, cut, first = [], [], 0, None
    for conversation, text in render_all(conversations, speech, variables or {}):
        for note in text.notes:
            if note.status not in HARMFUL:
                noted.setdefault(note.status, []).append(f"{conversation.source}, reply {note.turn + 1}: {note.words}")
                continue
            raise TemplateError(
                f"{conversation.source}: reply {note.turn + 1}: {note.words}; the model would learn something else "
                "than what stands in the data. Choose another chat_template"
            )
        example = encode_rendered(text, speech.tokenizer, max_length, conversation.source)
        if example.cut and truncation != "cut":
            too_long.append(conversation.source)
        elif example.supervised_tokens == 0:
            without_reply.append(conversation.source)
        else:
            first = first or text
            cut += example.cut > 0
            examples.append(example)
    if too_long and truncation == "error":
        raise DataError(
            f"{some(too_long)} longer than max_length {max_length} tokens; raise it, or set truncation to drop or cut"
        )
    if not examples or first is None:
        gone = [f"{len(too_long)} too long for max_length {max_length}"] if too_long else []
        gone += [f"{len(without_reply)} without a supervised token"] if without_reply else []
        raise DataError("nothing is left to learn: " + (", ".join(gone) or "the dataset is empty"))
    return Prepared(examples, too_long, without_reply, cut, first, noted)


def some(sources: list[str]) -> str:
    """`3 rows (a:1, a:7, a:9) are`"""
    shown = ", ".join(sources[:3]) + (", …" if len(sources) > 3 else "")
    return f"{len(sources)} rows ({shown}) are" if len(sources) > 1 else f"row {shown} is"
