"""Settings and what was given as data → the examples to train on and those to evaluate on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from lora_sft.config import RunConfig, SourceSettings
from lora_sft.console import say, warn
from lora_sft.data.conversation import Conversation
from lora_sft.data.formats import Reading
from lora_sft.data.intake import Intake
from lora_sft.data.mixing import Share, describe, mix
from lora_sft.data.sources import read_rows
from lora_sft.data.split import split
from lora_sft.errors import DataError, SettingError
from lora_sft.model.tokenizer import Speech
from lora_sft.preparation.cache import cached
from lora_sft.preparation.lost import refuse_losses
from lora_sft.preparation.prepare import NO_REPLY, Prepared, prepare, some


@dataclass(frozen=True)
class Source:
    """One dataset, and how it is read and mixed.

    Attributes:
        given: a path, a hub name, rows or a `datasets` object.
        name: what a person calls it.
        split: which split of it.
        reading: how its rows are written.
        weight, count, fraction: as in `SourceSettings`.
    """

    given: Any
    name: str
    split: str
    reading: Reading
    weight: float | None = None
    count: int | None = None
    fraction: float | None = None


@dataclass(frozen=True)
class Data:
    """What a run learns from.

    Attributes:
        train, evaluation: `evaluation` is None if nothing is kept out.
        intake: the account of the rows that were read to train on.
    """

    train: Prepared
    evaluation: Prepared | None
    intake: Intake


def read_data(config: RunConfig, speech: Speech, dataset: Any = None, eval_dataset: Any = None) -> Data:
    """Everything that is read, checked, rendered and tokenized before a run.

    Args:
        dataset, eval_dataset: objects instead of the settings' names.

    Raises:
        DataError, TemplateError: something is wrong with the data, or with what a template makes of it.
    """
    given = config.dataset if dataset is None else dataset
    if given is None:
        raise DataError("no data: give conversations with dataset (--dataset), a file, a folder or a hub name")
    aside = config.eval_dataset if eval_dataset is None else eval_dataset
    split = config.eval_dataset_split or config.dataset_split
    if aside is not None and split == config.dataset_split and (aside is given or aside == given):
        raise DataError("eval_dataset is the dataset that is trained on; use eval_size to keep a part of it out")
    sources = sources_of(given, config, config.dataset_split)
    train, intake, owners = _prepared(sources, config, speech, with_words=aside is None and config.eval_size > 0)
    evaluation = None
    if aside is not None:
        evaluation, _, _ = _prepared(sources_of(aside, config, split), config, speech)
    elif config.eval_size:
        train, evaluation, kept = _split(train, config)
        owners = owners[kept]
    return Data(_mixed(train, sources, owners, config), evaluation, intake)


def sources_of(given: Any, config: RunConfig, split: str) -> list[Source]:
    """What was given as data → its sources. A list of names, of settings, or of (source, weight) is several."""
    if isinstance(given, (str, Path)) or not _is_several(given):
        given = [given]
    return [_source(one, config, split) for one in given]


def _is_several(given: Any) -> bool:
    if not isinstance(given, (list, tuple)) or not given:
        return False
    kinds = (str, Path, SourceSettings)
    return all(
        isinstance(one, kinds) or _is_weighted(one) or (isinstance(one, dict) and "path" in one) for one in given
    )


def _is_weighted(one: Any) -> bool:
    return isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], (int, float))


def _source(given: Any, config: RunConfig, split: str) -> Source:
    own = SourceSettings(path="")
    if _is_weighted(given):
        given, own = given[0], SourceSettings(path="", weight=given[1])
    elif isinstance(given, dict) and "path" in given:
        given = _checked(given)
    if isinstance(given, SourceSettings):
        given, own = given.path, given
    reading = Reading(
        own.layout or config.layout,
        config.columns if own.columns is None else own.columns,
        config.roles if own.roles is None else own.roles,
    )
    name = str(given) if isinstance(given, (str, Path)) else type(given).__name__
    return Source(given, name, own.split or split, reading, own.weight, own.count, own.fraction)


def _checked(given: dict[str, Any]) -> SourceSettings:
    try:
        return SourceSettings(**given)
    except ValidationError as error:
        names = ", ".join(SourceSettings.model_fields)
        wrong = [
            f"dataset: {'.'.join(map(str, e['loc']))}: {e['msg'].lower()} (known: {names})" for e in error.errors()
        ]
        raise SettingError.of(wrong) from None


def conversations_of(
    sources: Sequence[Source], intake: Intake, on_bad_row: str, ends: list[int] | None = None
) -> Iterator[Conversation]:
    """The conversations of all sources, one after the other.

    Args:
        intake: is filled on the way.
        ends: gets the number of conversations up to the end of each source.

    Raises:
        DataError: at the end, if rows cannot be trained on and `on_bad_row` is `error`; with `skip` if all cannot.
    """
    for source in sources:
        before = intake.rows
        yield from intake.conversations(read_rows(source.given, source.split), source.reading)
        if intake.rows == before and len(sources) > 1:
            raise DataError(
                f"{source.name}: holds no rows, unlike the other sources; is it whole? Leave it out if it is"
            )
        if ends is not None:
            ends.append(intake.usable)
    intake.count_repetitions()
    if on_bad_row == "error" or (on_bad_row == "skip" and not intake.usable):
        intake.refuse()


def _prepared(
    sources: Sequence[Source], config: RunConfig, speech: Speech, with_words: bool = False
) -> tuple[Prepared, Intake, NDArray[np.int64]]:
    """(the examples of all sources, the account of their rows, for each example the number of its source)."""
    how: dict[str, Any] = {
        "max_length": config.max_length,
        "truncation": config.truncation,
        "variables": config.chat_template_kwargs,
        "turns": config.turns,
        "append_stop_token": config.append_stop_token,
        "allow": config.allow,
        "with_words": with_words,
    }

    def make(path: Path) -> tuple[Prepared, Intake, list[int]]:
        intake, ends = Intake(), list[int]()
        stream = conversations_of(sources, intake, config.on_bad_row, ends)
        return prepare(stream, speech, processes=config.dataset_num_proc, path=path, **how), intake, ends

    key = {"how": how, "on_bad_row": config.on_bad_row, "reading": [source.reading for source in sources]}
    prepared, intake, ends = cached(config.data_cache, speech, [(s.given, s.split) for s in sources], key, make)
    _tell(prepared, intake, config)
    refuse_losses(prepared, intake, config.max_lost_share)
    return prepared, intake, np.searchsorted(np.array(ends), prepared.examples.conversations, side="right")


def _split(whole: Prepared, config: RunConfig) -> tuple[Prepared, Prepared, list[int]]:
    """(to train on, to evaluate on, the places of the former): by conversation, near-duplicates on one side."""
    examples = whole.examples
    numbers, firsts = np.unique(examples.conversations, return_index=True)
    said = [[{"role": "user", "content": words}] for words in examples.select(firsts).words()]
    talks = [Conversation(messages, source=str(n)) for n, messages in zip(numbers, said, strict=True)]
    parts = split(talks, config.eval_size, config.seed)
    if parts.alike:
        say("eval_size", f"{parts.alike:,} conversations have near-duplicates, which stand on the same side")
    held_out = [int(talk.source) for talk in parts.held_out]
    aside = np.isin(examples.conversations, held_out)
    kept = np.flatnonzero(~aside)
    nothing: dict[str, Any] = {
        "too_long": [],
        "without_reply": [],
        "noted": {},
        "examples_of": {},
        "replies": 0,
        "cut": 0,
        "split": 0,
    }
    train = replace(whole, examples=examples.select(kept))
    return train, replace(whole, examples=examples.select(np.flatnonzero(aside)), **nothing), list(kept)


def _mixed(prepared: Prepared, sources: Sequence[Source], owners: NDArray[np.int64], config: RunConfig) -> Prepared:
    """The examples in the shares that the sources ask for."""
    places = [np.flatnonzero(owners == number) for number in range(len(sources))]
    shares = [
        Share(source.name, len(mine), source.weight, source.count, source.fraction)
        for source, mine in zip(sources, places, strict=True)
    ]
    if all(share.weight is None and share.count is None and share.fraction is None for share in shares):
        return prepared
    order = mix(shares, config.seed, config.mix_replacement, config.mix_size)
    for name, rows, taken, share in describe(shares, order):
        say("mix", f"{name}: {taken:,} of {rows:,} examples, {share:.1%} of the mix")
    return replace(prepared, examples=prepared.examples.select(places[source][row] for source, row in order))


def _tell(found: Prepared, intake: Intake, config: RunConfig) -> None:
    """What a person should know of the data, each kind once."""
    say("data", ", ".join(f"{count:,} rows of layout {name}" for name, count in intake.layouts.most_common()))
    if intake.unused:
        say("columns", "not used: " + ", ".join(f"{name} ({n:,} rows)" for name, n in intake.unused.most_common(8)))
    if intake.grave:
        first = next(problem for problem in intake.problems if problem.is_grave)
        warn(f"{intake.grave:,} of {intake.rows:,} rows cannot be trained on and are left out; {first}")
    if intake.duplicates:
        warn(f"{intake.duplicates:,} rows say the same as one before (`lora-sft validate` names them)")
    mild = [problem for problem in intake.problems if not problem.is_grave]
    if mild:
        warn(f"{len(mild):,} rows to look at; {mild[0]} (`lora-sft validate` shows all)")
    if found.too_long:
        warn(
            f"{some(found.too_long)} longer than max_length {config.max_length} and dropped, with "
            f"{found.tokens_dropped:,} tokens that would be learned"
        )
    if found.cut:
        lost = {"cut": "their end, and with it the stop token", "oldest": "their oldest turns"}
        what = lost.get(config.truncation, "their newest turns")
        warn(f"{found.cut:,} rows lost {what}: {found.tokens_cut:,} tokens are not learned")
    if found.without_reply:
        warn(f"{some(found.without_reply)} without a supervised token and dropped")
    for status, count in found.noted.items():
        if status != NO_REPLY:
            advice = ADVICE.get(status, "") if config.turns == "all" else ""
            warn(f"{status}: {count:,} of {found.replies:,} replies; {found.examples_of[status][0]}{advice}")
    if found.split:
        warn(f"{found.split:,} of {found.replies:,} replies begin inside a token; it is split there, as in inference")


ADVICE: Mapping[str, str] = {"rewritten": " (turns: each learns every reply as it is produced)"}
