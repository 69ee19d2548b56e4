"""Conversations → examples ready to train on, with every row and every supervised token accounted for."""

import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lora_sft.chat.labels import Example, encode_rendered
from lora_sft.chat.rendering import Rendered, Turns, render_turns
from lora_sft.chat.turns import DROPPED, HARMFUL, NO_STOP_TOKEN
from lora_sft.data.conversation import Conversation
from lora_sft.data.split import text_to_compare
from lora_sft.errors import DataError, ModelError, TemplateError
from lora_sft.model.tokenizer import Speech
from lora_sft.preparation.shortening import shortened
from lora_sft.preparation.store import Examples, ExampleWriter, temporary_file

Truncation = Literal["drop", "oldest", "newest", "cut", "error"]
NO_REPLY = "no reply"

HELP = {
    DROPPED: "the model would learn something else than what stands in the data. Choose another chat_template, or "
    "accept it with allow: [dropped]",
    NO_STOP_TOKEN: "the model would not learn to stop. Put one there with append_stop_token, or accept it with "
    "allow: [no_stop_token]",
    NO_REPLY: "nothing is learned from them. Take them out of the data, or accept it with allow: [no_reply]",
}


class First(NamedTuple):
    """The first conversation of the data as text, to be looked at; with its supervised tokens, and all of them."""

    source: str
    rendered: Rendered
    learned: int
    tokens: int


@dataclass(frozen=True)
class Prepared:
    """Examples, and what became of the conversations and supervised tokens that are not among them.

    Attributes:
        examples: in the order of the data.
        too_long: sources of the rows dropped because they exceed `max_length`.
        without_reply: sources of the rows dropped because no supervised token is in them.
        cut: how many rows lost a part.
        first: the first conversation, to be looked at.
        replies: how many replies were found.
        noted: {status: how often} of what a person should know of replies, though they are learned as they stand.
        examples_of: {status: a few of them, a line each}.
        split: how many replies begin inside a token of the whole text, which is split there.
        tokens_cut: supervised tokens lost with the parts of rows.
        tokens_dropped: supervised tokens lost with whole rows.
    """

    examples: Examples
    too_long: list[str]
    without_reply: list[str]
    cut: int
    first: First
    replies: int = 0
    noted: dict[str, int] = field(default_factory=dict)
    examples_of: dict[str, list[str]] = field(default_factory=dict)
    split: int = 0
    tokens_cut: int = 0
    tokens_dropped: int = 0

    @property
    def tokens(self) -> int:
        """All tokens, supervised or not."""
        return int(self.examples.lengths.sum())

    @property
    def supervised_tokens(self) -> int:
        """Tokens that are learned."""
        return int(self.examples.learned.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.examples.lengths.max())


@dataclass(frozen=True)
class Outcome:
    """What became of one conversation.

    Attributes:
        examples: what is trained of it; none if it is dropped.
        notes: a line for each thing that a person should know, with its status.
        replies: how many were found.
        split: how many replies had a token split at their start.
        is_too_long: whether (a part of) it was dropped for its length.
        is_cut: whether it lost a part.
        tokens_cut, tokens_dropped: supervised tokens that were lost.
    """

    examples: list[Example]
    notes: list[tuple[str, str]]
    replies: int
    split: int
    is_too_long: bool = False
    is_cut: bool = False
    tokens_cut: int = 0
    tokens_dropped: int = 0


def render_conversation(
    conversation: Conversation,
    speech: Speech,
    variables: dict[str, Any],
    turns: Turns = "all",
    append_stop_token: bool = False,
) -> list[Rendered]:
    """What is trained of a conversation, as text. Plain text is learned whole, with the end-of-sequence token.

    Raises:
        TemplateError: names the row on which the template fails.
    """
    if conversation.text is not None:
        text = conversation.text + str(speech.tokenizer.eos_token or "")
        return [Rendered(text, [(0, len(text))], replies=1)]
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
    conversations: Iterable[Conversation],
    speech: Speech,
    max_length: int,
    truncation: Truncation = "drop",
    variables: dict[str, Any] | None = None,
    turns: Turns = "all",
    append_stop_token: bool = False,
    allow: Iterable[str] = (),
    processes: int = 1,
    path: Path | None = None,
    with_words: bool = False,
) -> Prepared:
    """Conversations → Prepared. They are walked through once, and never in memory all together.

    Args:
        max_length: in tokens.
        truncation: what happens to longer rows: `drop`, leave out the `oldest` or the `newest` turns until they fit,
            `cut` (the end is lost, and with it the stop token) or `error`.
        variables: for the chat template.
        turns, append_stop_token: as `render_turns`.
        allow: statuses, with `_` for the space, that are noted instead of refused.
        processes: how many share the work.
        path: the file that the examples are written to; None takes a temporary one.
        with_words: whether to keep what near-duplicates are found by.

    Raises:
        TemplateError: the template leaves something out, or ends a reply without a stop token.
        DataError: rows are too long and `truncation` is `error`, or nothing is left to learn.
    """
    rendering = partial(
        render_conversation, speech=speech, variables=variables or {}, turns=turns, append_stop_token=append_stop_token
    )
    encoding = partial(_encoded, rendering=rendering, speech=speech, max_length=max_length, truncation=truncation)
    path = temporary_file() if path is None else path
    noted = Notes()
    counts: Counter[str] = Counter()
    too_long: list[str] = []
    without_reply: list[str] = []
    first: tuple[Conversation, Example] | None = None
    with ExampleWriter(path) as writer:
        for number, (conversation, outcome) in enumerate(_each(encoding, conversations, processes)):
            for status, line in outcome.notes:
                noted.add(status, line)
            counts.update(
                replies=outcome.replies,
                split=outcome.split,
                cut=outcome.is_cut and _learned(outcome.examples) > 0,
                tokens_cut=outcome.tokens_cut,
                tokens_dropped=outcome.tokens_dropped,
            )
            if outcome.is_too_long:
                too_long.append(conversation.source)
            for example in outcome.examples:
                if example.supervised_tokens == 0:
                    without_reply.append(conversation.source)
                    if not outcome.is_cut:
                        noted.add(NO_REPLY, f"{conversation.source}: no reply is learned")
                    continue
                first = first or (conversation, example)
                writer.add(example, number, text_to_compare(conversation) if with_words else "")
    noted.refuse({status.replace("_", " ") for status in allow})
    if too_long and truncation == "error":
        raise DataError(
            f"{some(too_long)} longer than max_length {max_length} tokens; raise it, or set truncation to drop, "
            "oldest, newest or cut"
        )
    if first is None:
        gone = [f"{len(too_long)} too long for max_length {max_length}"] if too_long else []
        gone += [f"{len(without_reply)} without a supervised token"] if without_reply else []
        raise DataError("nothing is left to learn: " + (", ".join(gone) or "the dataset is empty"))
    conversation, example = first
    shown = Rendered("(tokens, no text)", []) if conversation.input_ids else rendering(conversation)[0]
    return Prepared(
        Examples(path),
        too_long,
        without_reply,
        first=First(conversation.source, shown, example.supervised_tokens, len(example.input_ids)),
        noted=dict(noted.counts),
        examples_of=noted.lines,
        **counts,
    )


def _encoded(
    conversation: Conversation,
    rendering: Callable[[Conversation], list[Rendered]],
    speech: Speech,
    max_length: int,
    truncation: Truncation,
) -> Outcome:
    """What becomes of a conversation."""
    source = conversation.source

    def encode(one: Conversation) -> tuple[list[Rendered], list[Example]]:
        if one.input_ids is not None and one.labels is not None:
            return [], [Example(one.input_ids, one.labels, source=source)]
        texts = rendering(one)
        try:
            return texts, [encode_rendered(text, speech.tokenizer, source=source) for text in texts]
        except ModelError as error:
            raise ModelError(f"{source}: {error}") from None

    texts, examples = encode(conversation)
    notes = [(note.status, f"{source}, reply {note.turn + 1}: {note.words}") for text in texts for note in text.notes]
    outcome = Outcome(
        examples, notes, sum(text.replies for text in texts) or 1, sum(example.split for example in examples)
    )
    if all(len(example.input_ids) <= max_length for example in examples):
        return outcome
    total = _learned(examples)
    if truncation in ("oldest", "newest") and conversation.messages:
        shorter = shortened(conversation, truncation, lambda one: _fits(encode(one)[1], max_length))
        if shorter is not None:
            kept = encode(shorter)[1]
            return replace(outcome, examples=kept, is_cut=True, tokens_cut=max(0, total - _learned(kept)))
    elif truncation == "cut":
        kept = [_cut(example, max_length) for example in examples]
        return replace(outcome, examples=kept, is_cut=True, tokens_cut=total - _learned(kept))
    kept = [example for example in examples if len(example.input_ids) <= max_length]
    return replace(outcome, examples=kept, is_too_long=True, tokens_dropped=total - _learned(kept))


def _learned(examples: Iterable[Example]) -> int:
    return sum(example.supervised_tokens for example in examples)


def _fits(examples: Iterable[Example], max_length: int) -> bool:
    """Whether examples are short enough, and something is learned in them."""
    examples = list(examples)
    return _learned(examples) > 0 and all(len(example.input_ids) <= max_length for example in examples)


def _cut(example: Example, max_length: int) -> Example:
    lost = max(0, len(example.input_ids) - max_length)
    return replace(example, input_ids=example.input_ids[:max_length], labels=example.labels[:max_length], cut=lost)


Encoding = Callable[[Conversation], Outcome]
_in_this_process: list[Encoding] = []  # a worker's copy, so that the tokenizer travels once and not with every row
ROUND = 4096
"""So many conversations are handed to the processes at once."""


def _each(
    encoding: Encoding, conversations: Iterable[Conversation], processes: int
) -> Iterator[tuple[Conversation, Outcome]]:
    """Every conversation with what becomes of it, in order."""
    if processes == 1:
        yield from ((conversation, encoding(conversation)) for conversation in conversations)
        return
    # As `datasets` does: forked workers need no guard around a user's script, and have everything imported.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    remaining = iter(conversations)
    with ProcessPoolExecutor(processes, context, _in_this_process.append, (encoding,)) as pool:
        while some_of_them := list(islice(remaining, ROUND)):
            chunk = max(1, min(256, len(some_of_them) // (4 * processes)))
            yield from zip(some_of_them, pool.map(_encode_here, some_of_them, chunksize=chunk), strict=True)


def _encode_here(conversation: Conversation) -> Outcome:
    return _in_this_process[-1](conversation)


class Notes:
    """What was noted of replies: how often each kind, and the first lines of it."""

    KEPT = 100

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.lines: dict[str, list[str]] = {}
        self._kinds: dict[str, dict[str, str]] = {}

    def add(self, status: str, line: str) -> None:
        """One more."""
        self.counts[status] += 1
        lines = self.lines.setdefault(status, [])
        if len(lines) < self.KEPT:
            lines.append(line)
            self._kinds.setdefault(status, {}).setdefault(line.partition(": ")[2], line)

    def refuse(self, allowed: set[str]) -> None:
        """Raises what must not pass without the user's word: the first rows of each kind, and how many there are."""
        refused = [status for status in (*HARMFUL, NO_REPLY) if status in self.counts and status not in allowed]
        problems = []
        for status in refused:
            shown = list(self._kinds[status].values())[:3]
            count = f" ({self.counts[status]:,} times)" if self.counts[status] > len(shown) else ""
            problems.append(f"{'; '.join(shown)}{count}; {HELP[status]}")
        if problems:
            raise (DataError if refused == [NO_REPLY] else TemplateError).of(problems)


def some(sources: list[str]) -> str:
    """`3 rows (a:1, a:7, a:9) are`"""
    shown = ", ".join(sources[:3]) + (", …" if len(sources) > 3 else "")
    return f"{len(sources)} rows ({shown}) are" if len(sources) > 1 else f"row {shown} is"
