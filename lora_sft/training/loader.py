"""Examples and a plan of micro-batches → their tensors, in the order of (seed, epoch)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from lora_sft.chat import IGNORED
from lora_sft.chat.labels import Example
from lora_sft.preparation.store import Examples
from lora_sft.training.batching import Batching, Lengths, lay_in_rows, plan_batches
from lora_sft.training.evaluation import pad
from lora_sft.training.guarding import TOKENS
from lora_sft.training.loss import Supervised


@dataclass(frozen=True)
class Collator:
    """Examples of one micro-batch → its tensors, and under `TOKENS` their tokens. None at all → nothing is learned."""

    batching: Batching
    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The tensors of `lay_in_rows` or `pad`, and of `Supervised`."""
        tokens = sum(len(example.input_ids) for example in examples)
        rows = examples or [Example([self.pad_token_id] * 2, [IGNORED] * 2)]
        if self.batching.packing or self.batching.one_row:
            batch: Mapping[str, Any] = lay_in_rows(rows, self.batching, self.pad_token_id)
        else:
            batch = pad(rows, self.pad_token_id)
        # Found here, on the CPU: on the device the step would have to wait for it.
        supervised = Supervised.of(batch["labels"])
        return {**batch, **supervised._asdict(), TOKENS: torch.tensor(tokens)}


class Rows(Sequence[Example]):
    """Examples; those of a file with arrays in place of lists, which is ten times as fast."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __getitem__(self, index: Any) -> Any:
        if isinstance(self.examples, Examples):
            return Example(*self.examples.arrays(index))  # type: ignore[arg-type]
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)


class MicroBatches(Sampler[list[int]]):
    """The micro-batches of one process, in the order that (seed, epoch) says. It remembers nothing else."""

    def __init__(self, lengths: Lengths, batching: Batching, rank: int) -> None:
        self.lengths, self.batching, self.rank = lengths, batching, rank
        self._epoch, self._plan = 0, plan_batches(lengths, batching)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before every epoch, also before one that is resumed."""
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, plan_batches(self.lengths, self.batching, epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._plan.batches[self.rank :: self.batching.ranks])

    def __len__(self) -> int:
        return self._plan.batches_of_a_process


class MicroBatchLoader(DataLoader[Any]):
    """A DataLoader that tells its batch sampler the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers; where it has wrapped the sampler to skip batches, it calls that one instead."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
