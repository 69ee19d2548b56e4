"""Lengths of examples → which of them share a micro-batch, and in what order, the same again for every (seed, epoch).

An epoch is dealt out in rounds: `ranks` micro-batches that the processes compute at the same time. Every example comes
once; where the last round has too few, a process gets an empty micro-batch, in which nothing is learned.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_sft.chat import IGNORED
from lora_sft.chat.labels import Example
from lora_sft.training.difference import Difference

if TYPE_CHECKING:
    from lora_sft.config import RunConfig

Order = Literal["random", "sequential", "group_by_length"]
Lengths = Sequence[int] | NDArray[np.integer[Any]]
Unit = TypeVar("Unit")

ROUNDS_SORTED_TOGETHER = 50
"""Of so many rounds, but at most a quarter of all, the rows are sorted by length: enough that neighbours are alike, few
enough that other rows meet in every epoch. The numbers are those of `LengthGroupedSampler` in transformers."""

ORDER_IN_WORDS = {
    "random": "in random order",
    "sequential": "in the order of the data",
    "group_by_length": "similar lengths together",
}


@dataclass(frozen=True)
class Batching:
    """How micro-batches are made.

    Attributes:
        micro_batch: examples in a forward pass on one device; with packing, bins of `max_length` tokens.
        max_length: capacity of a bin, in tokens.
        packing: whether examples are laid end to end.
        one_row: all examples of a micro-batch end to end in one row, packed or not, so that nothing is padded. For
            kernels that know the borders; others compute the square of the row's length.
        order: of the examples; with packing, of the bins, for which `group_by_length` is as `random`.
        seed: of the order.
        ranks: processes that share the work.
        apart: what examples that share a row do to each other's logits, as measured; None where none share one.
    """

    micro_batch: int
    max_length: int
    packing: bool = False
    one_row: bool = False
    order: Order = "group_by_length"
    seed: int = 42
    ranks: int = 1
    apart: Difference | None = field(default=None, compare=False)

    @classmethod
    def of(cls, config: "RunConfig", ranks: int = 1) -> "Batching":
        """What the settings ask for."""
        return cls(
            micro_batch=config.per_device_train_batch_size,
            max_length=config.max_length,
            packing=config.packing,
            order=config.train_sampling_strategy,
            seed=config.seed,
            ranks=ranks,
        )


@dataclass(frozen=True)
class BatchPlan:
    """The micro-batches of one epoch.

    Attributes:
        batches: indices of the examples in each, in the order in which they are trained on. Process r of R computes
            every R-th of them, from the r-th on. An empty one evens out the last round.
        batching: how they were made.
        tokens: of all examples.
        padding: tokens that are computed only because rows of a micro-batch have one length.
    """

    batches: list[list[int]]
    batching: Batching
    tokens: int
    padding: int

    @property
    def waste(self) -> float:
        """Padding as a share of all tokens that are computed."""
        return self.padding / max(self.tokens + self.padding, 1)

    @property
    def batches_of_a_process(self) -> int:
        """Micro-batches that each process computes in an epoch."""
        return len(self.batches) // self.batching.ranks

    def steps_of_an_epoch(self, gradient_accumulation_steps: int) -> int:
        """Optimizer steps."""
        return max(1, math.ceil(self.batches_of_a_process / gradient_accumulation_steps))

    def describe(self) -> str:
        """One line: how many micro-batches of what, and how much of them is padding."""
        way = ORDER_IN_WORDS[self.batching.order]
        if self.batching.packing:
            rows = self.batching.micro_batch if self.batching.one_row else 1
            way = f"packed into rows of at most {rows * self.batching.max_length:,} tokens"
        elif self.batching.one_row:
            way += ", end to end in one row"
        return (
            f"{sum(map(len, self.batches)):,} examples in {sum(map(bool, self.batches)):,} micro-batches, {way}; "
            f"{self.waste:.1%} of the tokens are padding"
        )


def plan_batches(lengths: Lengths, batching: Batching, epoch: int = 0) -> BatchPlan:
    """Lengths in tokens → the micro-batches of an epoch. Their number is the same in every epoch.

    Raises:
        ValueError: with packing, an example is longer than `max_length`.
    """
    if batching.packing:
        bins = _in_order(_packed_anew(lengths, batching, epoch), batching, epoch)
        batches = [list(chain(*some)) for some in _deal(bins, batching.micro_batch, batching.ranks)]
    elif batching.order == "group_by_length":
        batches = group_by_length(lengths, batching.micro_batch, batching.seed, epoch, batching.ranks)
    else:
        rows = _in_order(list(range(len(lengths))), batching, epoch)
        batches = _deal(rows, batching.micro_batch, batching.ranks)
    end_to_end = batching.packing or batching.one_row
    padding = _padding_of_rows(lengths, batches, batching) if end_to_end else count_padding(lengths, batches)
    return BatchPlan(batches, batching, int(np.asarray(lengths, dtype=np.int64).sum()), padding)


def compare(lengths: Lengths, batching: Batching) -> dict[str, float]:
    """{"random", "group_by_length", "packing": share of the computed tokens that is padding} in the first epoch."""
    ways = {
        "random": replace(batching, packing=False, order="random"),
        "group_by_length": replace(batching, packing=False, order="group_by_length"),
        "packing": replace(batching, packing=True),
    }
    return {name: plan_batches(lengths, way).waste for name, way in ways.items()}


def count_padding(lengths: Lengths, batches: Sequence[Sequence[int]]) -> int:
    """Tokens by which the rows of every micro-batch are shorter than its longest."""
    counts = np.array([len(rows) for rows in batches if rows], dtype=np.int64)
    if not len(counts):
        return 0
    size = np.asarray(lengths, dtype=np.int64)[np.fromiter(chain.from_iterable(batches), dtype=np.int64)]
    longest = np.maximum.reduceat(size, np.cumsum(counts) - counts)
    return int((longest * counts).sum() - size.sum())


def _padding_of_rows(lengths: Lengths, batches: Sequence[Sequence[int]], batching: Batching) -> int:
    """The same for packed micro-batches."""
    if batching.one_row or batching.micro_batch == 1:
        return 0
    padding = 0
    for batch in batches:
        sizes = [int(lengths[index]) for index in batch]
        padding += computed_tokens(sizes, batching) - sum(sizes)
    return padding


def computed_tokens(sizes: Sequence[int], batching: Batching) -> int:
    """How many tokens a forward pass over a micro-batch computes, padding included.

    Args:
        sizes: tokens of its examples, in their order.
    """
    if batching.one_row:
        return sum(sizes)
    rows = [sum(sizes[first:last]) for first, last in pairwise(_row_borders(sizes, batching))]
    return max(rows) * len(rows) if batching.packing else max(sizes, default=0) * len(sizes)


def halve(sizes: Sequence[int], batching: Batching) -> int:
    """Where a micro-batch of two examples or more is cut: so many go into the first half, and the larger half computes
    as few tokens as can be.

    Args:
        sizes: as for `computed_tokens`.
    """

    def larger_half(cut: int) -> tuple[int, int]:
        halves = sizes[:cut], sizes[cut:]
        return max(computed_tokens(half, batching) for half in halves), abs(len(sizes) - 2 * cut)

    return min(range(1, len(sizes)), key=larger_half)


def pack(lengths: Lengths, capacity: int) -> list[list[int]]:
    """Best fit, longest first: every example goes whole into the fullest bin that still holds it.

    Args:
        lengths: in tokens.
        capacity: of a bin, in tokens.

    Returns:
        The indices in each bin. Depends on nothing but the arguments, and how many bins there are does not depend on
        the order of `lengths`.

    Raises:
        ValueError: an example is longer than a bin.
    """
    size = np.asarray(lengths, dtype=np.int64)
    if len(size) and size.max() > capacity:
        raise ValueError(f"example {size.argmax()} has {size.max()} tokens, and a bin holds {capacity}")
    smallest = max(int(size.min()), 1) if len(size) else 1
    bins: list[list[int]] = []
    spaces: list[int] = []  # the distinct spaces left over in open bins, sorted
    open_bins: dict[int, list[int]] = {}  # space: bins with that much left
    order = np.argsort(-size, kind="stable")
    for index, length in zip(order.tolist(), size[order].tolist(), strict=True):
        place = bisect_left(spaces, length)
        if place < len(spaces):
            space = spaces[place]
            chosen = open_bins[space].pop()
            if not open_bins[space]:
                del spaces[place], open_bins[space]
            bins[chosen].append(index)
        else:
            space, chosen = capacity, len(bins)
            bins.append([index])
        left = space - length
        if left >= smallest:
            if left not in open_bins:
                insort(spaces, left)
            open_bins.setdefault(left, []).append(chosen)
    return bins


def group_by_length(lengths: Lengths, micro_batch: int, seed: int, epoch: int, ranks: int = 1) -> list[list[int]]:
    """Micro-batches of similar lengths, in random order; the largest comes first, so that memory trouble shows at once.

    The micro-batches that are computed at the same time are alike too, so that no process waits for another.
    """
    random = np.random.default_rng([seed, epoch])
    size = np.asarray(lengths, dtype=np.int64)
    shuffled = random.permutation(len(size))
    in_round = micro_batch * ranks
    pool = in_round * max(1, min(ROUNDS_SORTED_TOGETHER, len(size) // (4 * in_round)))
    pools = [shuffled[start : start + pool] for start in range(0, len(shuffled), pool)]
    by_length = [some[np.argsort(-size[some], kind="stable")] for some in pools]
    rounds = [some[start : start + in_round] for some in by_length for start in range(0, len(some), in_round)]
    rounds = [rounds[place] for place in random.permutation(len(rounds))]
    if rounds:
        computed = [int(size[some[0]]) * len(some) for some in rounds]
        largest = computed.index(max(computed))
        rounds.insert(0, rounds.pop(largest))
    return [batch for some in rounds for batch in _deal(some.tolist(), micro_batch, ranks)]


def _packed_anew(lengths: Lengths, batching: Batching, epoch: int) -> list[list[int]]:
    """Bins; examples of equal length change places from epoch to epoch, so that they meet others."""
    if batching.order == "sequential":
        return pack(lengths, batching.max_length)
    shuffled = np.random.default_rng([batching.seed, epoch, 1]).permutation(len(lengths))
    bins = pack(np.asarray(lengths, dtype=np.int64)[shuffled], batching.max_length)
    return [shuffled[some].tolist() for some in bins]


def _in_order(units: list[Unit], batching: Batching, epoch: int) -> list[Unit]:
    """Rows or bins, shuffled unless the data's own order is asked for."""
    if batching.order == "sequential":
        return units
    return [units[place] for place in np.random.default_rng([batching.seed, epoch]).permutation(len(units))]


def _deal(units: list[Unit], micro_batch: int, ranks: int) -> list[list[Unit]]:
    """Units in order → micro-batches, as many for every process; the units of the last round are spread over all."""
    in_round = micro_batch * ranks
    batches = []
    for start in range(0, len(units), in_round):
        some = units[start : start + in_round]
        borders = [rank * len(some) // ranks for rank in range(ranks + 1)]
        batches += [some[left:right] for left, right in pairwise(borders)]
    return batches


def lay_in_rows(examples: Sequence[Example], batching: Batching, pad_token_id: int) -> dict[str, Tensor | int]:
    """Examples of a micro-batch, laid end to end → its rows: those of `lay_end_to_end`, padded on the right.

    More than one row have `input_ids`, `labels`, `position_ids` and `seq_idx`, each (rows, longest); the padding of a
    row is as one more example in it, in which nothing is learned.
    """
    borders = _row_borders([len(example.input_ids) for example in examples], batching)
    rows = [lay_end_to_end(examples[first:last]) for first, last in pairwise(borders)]
    if len(rows) == 1:
        return rows[0]
    longest = max(row["input_ids"].shape[1] for row in rows)  # type: ignore[union-attr]
    batch: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": [], "seq_idx": []}
    for row in rows:
        missing = longest - row["input_ids"].shape[1]  # type: ignore[union-attr]
        number = len(row["cu_seq_lens_q"]) - 1  # type: ignore[arg-type]
        tail = {
            "input_ids": torch.full((1, missing), pad_token_id),
            "labels": torch.full((1, missing), IGNORED),
            "position_ids": torch.arange(missing)[None],
            "seq_idx": torch.full((1, missing), number, dtype=torch.int32),
        }
        for name, parts in batch.items():
            parts.append(torch.cat([row[name], tail[name]], dim=1))  # type: ignore[list-item]
    return {name: torch.cat(parts) for name, parts in batch.items()}


def _row_borders(lengths: Lengths, batching: Batching) -> list[int]:
    """Lengths in a packed micro-batch, bin after bin → where its rows begin and end; never more rows than bins."""
    if batching.one_row:
        return [0, len(lengths)]
    borders, used = [0], 0
    for place, length in enumerate(lengths):
        if used and used + length > batching.max_length:
            borders.append(place)
            used = 0
        used += length
    return [*borders, len(lengths)]


def lay_end_to_end(examples: Sequence[Example]) -> dict[str, Tensor | int]:
    """Examples → one row without padding, in which transformers keeps them apart.

    Returns:
        `input_ids` and `labels`, each (1, tokens), the first label of every example -100: nothing is predicted across
        a border. `position_ids` (1, tokens) start at 0 in every example, from which transformers makes the mask of
        eager, sdpa and flex attention, as long as there is no `attention_mask`. Flash attention takes the borders as
        `cu_seq_lens_q` and `cu_seq_lens_k` (examples + 1) with `max_length_q` and `max_length_k`, and layers with a
        convolution or a recurrence the number of the example at each token, `seq_idx` (1, tokens).

    Source: `DataCollatorForLanguageModeling` of TRL 1.16 with `padding_free`, and `masking_utils.py` of transformers.
    """
    sizes = [len(example.input_ids) for example in examples]
    borders = np.cumsum([0, *sizes], dtype=np.int32)
    labels = np.concatenate([example.labels for example in examples]).astype(np.int64)
    labels[borders[:-1]] = IGNORED
    rows = {
        "input_ids": np.concatenate([example.input_ids for example in examples]).astype(np.int64),
        "labels": labels,
        "position_ids": np.arange(borders[-1], dtype=np.int64) - np.repeat(borders[:-1], sizes),
        "seq_idx": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
    }
    return {
        **{name: torch.from_numpy(row)[None] for name, row in rows.items()},
        "cu_seq_lens_q": torch.from_numpy(borders),
        "cu_seq_lens_k": torch.from_numpy(borders),
        "max_length_q": max(sizes),
        "max_length_k": max(sizes),
    }
