"""Conversations → examples ready to train on, with every row accounted for."""

import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from lora_sft.chat.labels import Example, encode_rendered
from lora_sft.chat.rendering import Rendered, Turns, render_turns
from lora_sft.chat.turns import DROPPED, HARMFUL, NO_STOP_TOKEN
from lora_sft.data.conversation import Conversation
from lora_sft.errors import DataError, ModelError, TemplateError
from lora_sft.model.tokenizer import Speech

Truncation = Literal["drop", "cut", "error"]
NO_REPLY = "no reply"

HELP = {
    DROPPED: "the model would learn something else than what stands in the data. Choose another chat_template, or "
    "accept it with allow: [dropped]",
    NO_STOP_TOKEN: "the model would not learn to stop. Put one there with append_stop_token, or accept it with "
    "allow: [no_stop_token]",
    NO_REPLY: "nothing is learned from them. Take them out of the data, or accept it with allow: [no_reply]",
}


@dataclass(frozen=True)
class Prepared:
    """Examples, and what became of the conversations that are not among them.

    Attributes:
        examples: in the order of the data.
        too_long: sources of the rows dropped because they exceed `max_length`.
        without_reply: sources of the rows dropped because no supervised token is in them.
        cut: how many rows lost their end.
        first: the first example as text, to be looked at.
        replies: how many replies are learned.
        noted: {status: a line a reply} of what a person should know, though it is learned as it stands.
        split: how many replies begin inside a token of the whole text, which is split there.
    """

    examples: list[Example]
    too_long: list[str]
    without_reply: list[str]
    cut: int
    first: Rendered
    replies: int = 0
    noted: dict[str, list[str]] = field(default_factory=dict)
    split: int = 0

    @property
    def tokens(self) -> int:
        """All tokens, supervised or not."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that are learned."""
        return sum(example.supervised_tokens for example in self.examples)


def render_conversation(
    conversation: Conversation,
    speech: Speech,
    variables: dict[str, Any],
    turns: Turns = "all",
    append_stop_token: bool = False,
) -> list[Rendered]:
    """What is trained of a conversation, as text.

    Raises:
        TemplateError: names the row on which the template fails.
    """
    try:
        return render_turns(
            conversation.messages,
            speech.tokenizer,
            conversation.tools,
            stop_tokens=speech.stop_tokens,
            append_stop_token=append_stop_token,
            turns=turns,
            **variables,
        )
    except TemplateError as error:
        raise TemplateError(f"{conversation.source}: {error}") from None


def prepare(
    conversations: Sequence[Conversation],
    speech: Speech,
    max_length: int,
    truncation: Truncation = "drop",
    variables: dict[str, Any] | None = None,
    turns: Turns = "all",
    append_stop_token: bool = False,
    allow: Iterable[str] = (),
    processes: int = 1,
) -> Prepared:
    """Conversations → Prepared.

    Args:
        max_length: in tokens.
        truncation: what happens to longer rows: `drop`, `cut` (the end is lost, and with it the stop token) or `error`.
        variables: for the chat template.
        turns, append_stop_token: as `render_turns`.
        allow: statuses, with `_` for the space, that are noted instead of refused.
        processes: how many share the work.

    Raises:
        TemplateError: the template leaves something out, or ends a reply without a stop token.
        DataError: rows are too long and `truncation` is `error`, or nothing is left to learn.
    """
    rendering = partial(
        render_conversation, speech=speech, variables=variables or {}, turns=turns, append_stop_token=append_stop_token
    )
    encoding = partial(_encoded, rendering=rendering, speech=speech, max_length=max_length)
    examples: list[Example] = []
    noted: dict[str, list[str]] = {}
    too_long, without_reply, cut, split, replies, first = [], [], 0, 0, 0, None
    for conversation, (found, looked_at) in zip(conversations, _each(encoding, conversations, processes), strict=True):
        replies += looked_at
        for example in found:
            for note in example.notes:
                line = f"{conversation.source}, reply {note.turn + 1}: {note.words}"
                noted.setdefault(note.status, []).append(line)
            split += example.split
            if example.cut and truncation != "cut":
                too_long.append(conversation.source)
                continue
            if example.supervised_tokens == 0:
                without_reply.append(conversation.source)
                if not example.cut:
                    noted.setdefault(NO_REPLY, []).append(f"{conversation.source}: no reply is learned")
                continue
            first = first or conversation
            cut += example.cut > 0
            examples.append(example)
    _refuse(noted, {status.replace("_", " ") for status in allow})
    if too_long and truncation == "error":
        raise DataError(
            f"{some(too_long)} longer than max_length {max_length} tokens; raise it, or set truncation to drop or cut"
        )
    if not examples or first is None:
        gone = [f"{len(too_long)} too long for max_length {max_length}"] if too_long else []
        gone += [f"{len(without_reply)} without a supervised token"] if without_reply else []
        raise DataError("nothing is left to learn: " + (", ".join(gone) or "the dataset is empty"))
    return Prepared(examples, too_long, without_reply, cut, rendering(first)[0], replies, noted, split)


def _encoded(
    conversation: Conversation,
    rendering: Callable[[Conversation], list[Rendered]],
    speech: Speech,
    max_length: int,
) -> tuple[list[Example], int]:
    """(its examples, how many replies were looked at)."""
    found = rendering(conversation)
    try:
        examples = [encode_rendered(text, speech.tokenizer, max_length, conversation.source) for text in found]
    except ModelError as error:
        raise ModelError(f"{conversation.source}: {error}") from None
    return examples, sum(text.replies for text in found)


Encoding = Callable[[Conversation], tuple[list[Example], int]]
_in_this_process: list[Encoding] = []  # a worker's copy, so that the tokenizer travels once and not with every row


def _each(
    encoding: Encoding, conversations: Sequence[Conversation], processes: int
) -> Iterator[tuple[list[Example], int]]:
    """`encoding` of every conversation, in order."""
    if processes == 1 or len(conversations) < 2 * processes:
        yield from map(encoding, conversations)
        return
    # As `datasets` does: forked workers need no guard around a user's script, and have everything imported.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    chunk = max(1, min(256, len(conversations) // (4 * processes)))
    with ProcessPoolExecutor(processes, context, _in_this_process.append, (encoding,)) as pool:
        yield from pool.map(_encode_here, conversations, chunksize=chunk)


def _encode_here(conversation: Conversation) -> tuple[list[Example], int]:
    return _in_this_process[-1](conversation)


def _refuse(noted: dict[str, list[str]], allowed: set[str]) -> None:
    """Raises what must not pass without the user's word: the first rows of each kind, and how many there are."""
    problems = []
    refused = [status for status in (*HARMFUL, NO_REPLY) if status in noted and status not in allowed]
    for status in refused:
        lines = noted[status]
        kinds = Counter(line.partition(": ")[2] for line in lines)
        shown = [next(line for line in lines if line.endswith(kind)) for kind, _ in kinds.most_common(3)]
        count = f" ({len(lines):,} times)" if len(lines) > len(shown) else ""
        problems.append(f"{'; '.join(shown)}{count}; {HELP[status]}")
    if problems:
        raise (DataError if refused == [NO_REPLY] else TemplateError).of(problems)


def some(sources: list[str]) -> str:
    """`3 rows (a:1, a:7, a:9) are`"""
    shown = ", ".join(sources[:3]) + (", …" if len(sources) > 3 else "")
    return f"{len(sources)} rows ({shown}) are" if len(sources) > 1 else f"row {shown} is"
