"""Prepared data, or lengths alone → the micro-batches that a plan is made for: the largest, and the tokens in all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_sft.chat.labels import Example
from lora_sft.errors import SettingError
from lora_sft.training.batching import Batching, BatchPlan, Lengths, plan_batches
from lora_sft.training.evaluation import pad
from lora_sft.training.guarding import TOKENS
from lora_sft.training.loader import Collator
from lora_sft.training.recompute import largest_of

if TYPE_CHECKING:
    from lora_sft.model.tokenizer import Speech
    from lora_sft.preparation.dataset import Data
    from lora_sft.training.job import Job

WITHOUT_DATA = 1000
"""Examples of `max_length` tokens that are planned for if nothing is said of the data."""


class Blank(Sequence[Example]):
    """Examples of given lengths without words, in which everything is learned: as much as can be."""

    def __init__(self, lengths: Lengths) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: Any) -> Any:
        ids = [1] * int(self._lengths[index])
        return Example(ids, ids)


@dataclass(frozen=True)
class Workload:
    """What is trained on.

    Attributes:
        examples, lengths: of the training.
        evaluation: examples, if there is an evaluation.
        described: in words.
        pad_token_id: of the tokenizer.
    """

    examples: Sequence[Example]
    lengths: Lengths
    evaluation: Sequence[Example] | None
    described: str
    pad_token_id: int = 0
    _plans: dict[Batching, BatchPlan] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of_data(cls, data: "Job | Data", speech: "Speech") -> "Workload":
        """Prepared data, or that of a run."""
        train, evaluation = data.train, data.evaluation
        return cls(
            train.examples,
            train.examples.lengths,
            evaluation.examples if evaluation else None,
            f"{len(train.examples):,} examples of the data, {train.tokens:,} tokens",
            int(speech.tokenizer.pad_token_id or 0),
        )

    @classmethod
    def of_lengths(cls, lengths: Sequence[int] | None, max_length: int) -> "Workload":
        """Examples of so many tokens; None: all of `max_length`.

        Raises:
            SettingError: a length is no whole number from 2 on.
        """
        if lengths is None:
            lengths = [max_length] * WITHOUT_DATA
            words = f"{WITHOUT_DATA:,} examples of max_length {max_length:,} tokens (no data and no lengths were given)"
        else:
            if wrong := [length for length in lengths if not isinstance(length, int) or length < 2]:
                raise SettingError(f"lengths: {wrong[0]} is no number of tokens; write whole numbers from 2 on")
            kept = [length for length in lengths if length <= max_length]
            if not kept:
                raise SettingError(f"lengths: all are above max_length {max_length}; raise it, or lower them")
            words = f"{len(kept):,} examples of given lengths, {sum(kept):,} tokens, all of them learned"
            if len(kept) < len(lengths):
                words += f"; {len(lengths) - len(kept):,} are longer than max_length and would be dropped"
            lengths = kept
        return cls(Blank(lengths), lengths, None, words)

    def plan(self, batching: Batching) -> BatchPlan:
        """The micro-batches of an epoch."""
        if batching not in self._plans:
            self._plans[batching] = plan_batches(self.lengths, batching)
        return self._plans[batching]

    def largest(self, batching: Batching) -> dict[str, Any]:
        """The tensors of the micro-batch in which most is computed."""
        return self.collated(largest_of(self.plan(batching), self.lengths), batching)

    def collated(self, indices: Sequence[int], batching: Batching) -> dict[str, Any]:
        """The tensors of a micro-batch."""
        batch = Collator(batching, self.pad_token_id)([self.examples[index] for index in indices])
        return {name: value for name, value in batch.items() if name != TOKENS}

    def largest_evaluation(self, size: int) -> dict[str, Any] | None:
        """The tensors of that batch of the evaluation in which most is computed."""
        if not self.evaluation:
            return None
        lengths = [len(example.input_ids) for example in self.evaluation]
        starts = range(0, len(lengths), size)
        start = max(starts, key=lambda start: max(lengths[start : start + size]) * len(lengths[start : start + size]))
        return dict(
            pad([self.evaluation[row] for row in range(start, min(start + size, len(lengths)))], self.pad_token_id)
        )


def computed_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a micro-batch, padding included."""
    return int(batch["input_ids"].numel())


def mean_tokens(plan: BatchPlan) -> float:
    """Computed in a micro-batch on average, padding included."""
    return (plan.tokens + plan.padding) / max(sum(map(bool, plan.batches)), 1)


def read_lengths(text: str) -> list[int]:
    """`512`, `200,512,2048` or `512x1000` (a thousand of 512) → lengths.

    Raises:
        SettingError: it is none of these.
    """
    found: list[int] = []
    try:
        for part in filter(None, (part.strip() for part in text.split(","))):
            length, _, count = part.partition("x")
            found += [int(length)] * (int(count) if count else 1)
    except ValueError:
        raise SettingError(f"lengths: {text} is no list of lengths; write 200,512,2048 or 512x1000") from None
    if not found:
        raise SettingError("lengths: none is given; write 200,512,2048 or 512x1000")
    return np.asarray(found).tolist()  # type: ignore[no-any-return]
