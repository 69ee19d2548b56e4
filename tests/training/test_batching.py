"""Which examples share a micro-batch: nothing lost, nothing twice, the same again from (seed, epoch) alone."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_sft.chat.labels import Example
from lora_sft.training.batching import (
    Batching,
    compare,
    count_padding,
    group_by_length,
    lay_end_to_end,
    lay_in_rows,
    pack,
)
from lora_sft.training.batching import plan_batches as plan

LENGTHS = np.random.default_rng(0).lognormal(5, 1, 500).clip(5, 2000).astype(int).tolist()


def documents(lengths):
    return [Example([3] * length, [3] * length) for length in lengths]


def everything_once(batches, count):
    return sorted(chain(*batches)) == list(range(count))


def test_the_best_fit_is_the_fullest_bin_with_room():
    assert pack([6, 5, 4, 3, 2], capacity=10) == [[0, 2], [1, 3, 4]]


def best_fit_by_looking_at_every_bin(lengths, capacity):
    bins = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        room = [(capacity - sum(lengths[other] for other in some), some) for some in bins]
        fitting = [(left, some) for left, some in room if left >= lengths[index]]
        if fitting:
            min(fitting, key=lambda pair: pair[0])[1].append(index)
        else:
            bins.append([index])
    return bins


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 60))
def test_packing_finds_as_many_bins_as_a_search_through_all(lengths, capacity):
    found = pack(lengths, capacity)
    assert everything_once(found, len(lengths))
    assert all(sum(lengths[index] for index in some) <= capacity for some in found)
    expected = best_fit_by_looking_at_every_bin(lengths, capacity)
    fill = [[sorted(sum(lengths[index] for index in some) for some in bins)] for bins in (found, expected)]
    assert fill[0] == fill[1]
    assert len(pack(lengths[::-1], capacity)) == len(found)


def test_an_example_longer_than_a_bin_is_named():
    with pytest.raises(ValueError, match="example 1 has 11 tokens, and a bin holds 10"):
        pack([3, 11], capacity=10)


def test_packing_a_hundred_thousand_examples_fills_the_bins():
    lengths = np.random.default_rng(0).lognormal(5, 1, 100_000).clip(5, 2048).astype(int).tolist()
    bins = pack(lengths, 2048)
    assert sum(lengths) / (len(bins) * 2048) > 0.995


KINDS = {
    "random": {"order": "random"},
    "sequential": {"order": "sequential"},
    "group_by_length": {"order": "group_by_length"},
    "packing": {"packing": True},
    "packing in order": {"packing": True, "order": "sequential"},
    "packing in one row": {"packing": True, "one_row": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "micro_batch", "ranks"), [(500, 4, 1), (497, 4, 3), (3, 2, 4), (1, 8, 2)])
def test_every_example_comes_once_and_every_process_has_as_many_micro_batches(kind, count, micro_batch, ranks):
    batching = Batching(micro_batch, max_length=2000, ranks=ranks, **KINDS[kind])
    plans = [plan(LENGTHS[:count], batching, epoch) for epoch in range(3)]
    for found in plans:
        assert everything_once(found.batches, count)
        assert len(found.batches) % ranks == 0
        if not batching.packing:
            assert max(map(len, found.batches)) <= micro_batch
        else:
            tokens = [sum(LENGTHS[row] for row in rows) for rows in found.batches]
            assert max(tokens) <= micro_batch * 2000
            rows = [
                lay_in_rows(documents([LENGTHS[row] for row in some]), batching, 0) for some in found.batches if some
            ]
            assert all(len(batch["input_ids"]) <= (1 if batching.one_row else micro_batch) for batch in rows)
            assert sum(batch["input_ids"].numel() for batch in rows) == found.tokens + found.padding
    assert len({len(found.batches) for found in plans}) == 1


@pytest.mark.parametrize("kind", ["random", "group_by_length", "packing"])
def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(kind):
    batching = Batching(4, 2000, seed=1, **KINDS[kind])
    np.random.seed(0)
    first = plan(LENGTHS, batching, 1).batches
    np.random.seed(1)
    assert plan(LENGTHS, batching, 1).batches == first
    others = [plan(LENGTHS, batching, 2).batches, plan(LENGTHS, Batching(4, 2000, seed=2, **KINDS[kind]), 1).batches]
    assert first not in others
    together = Counter(frozenset(rows) for rows in first)
    assert all(together != Counter(frozenset(rows) for rows in other) for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_may_come_as_an_array(kind):
    batching = Batching(4, 2000, **KINDS[kind])
    assert plan(np.array(LENGTHS, dtype=np.int32), batching) == plan(LENGTHS, batching)


def test_the_data_s_own_order_is_kept():
    assert plan(LENGTHS[:5], Batching(2, 2000, order="sequential")).batches == [[0, 1], [2, 3], [4]]


def test_several_processes_share_what_one_computes_at_once():
    """Two with micro-batches of 2 learn in each step from the same rows as one with micro-batches of 4."""
    one = group_by_length(LENGTHS, 4, seed=3, epoch=0)
    assert len(one) == 125
    two = group_by_length(LENGTHS, 2, seed=3, epoch=0, ranks=2)
    assert [left + right for left, right in zip(two[::2], two[1::2], strict=True)] == one


def test_the_largest_micro_batch_comes_first():
    batches = group_by_length(LENGTHS, 4, seed=0, epoch=0)
    computed = [len(rows) * max(LENGTHS[row] for row in rows) for rows in batches]
    assert computed[0] == max(computed)
    assert computed[1:] != sorted(computed[1:], reverse=True)


def test_padding_is_what_rows_are_shorter_than_the_longest_beside_them():
    assert count_padding([5, 3, 7, 1], [[0, 1], [], [2], [3]]) == 2
    found = plan([5, 3, 7, 1], Batching(2, 10, order="sequential"))
    assert (found.tokens, found.padding) == (16, 2 + 6)
    assert found.waste == pytest.approx(8 / 24)


def test_grouping_saves_most_of_the_padding_and_packing_almost_all_of_it():
    found = compare(
        np.random.default_rng(0).lognormal(5, 1, 5000).clip(5, 2000).astype(int).tolist(), Batching(8, 2000)
    )
    assert found["random"] > 0.5
    assert found["group_by_length"] < 0.1
    assert found["packing"] < 0.01


def test_a_plan_says_what_it_is():
    assert plan([4] * 4, Batching(2, 10)).describe() == (
        "4 examples in 2 micro-batches, similar lengths together; 0.0% of the tokens are padding"
    )
    assert plan([4] * 4, Batching(1, 10, packing=True)).describe() == (
        "4 examples in 2 micro-batches, packed into rows of at most 10 tokens; 0.0% of the tokens are padding"
    )


def test_a_packed_row_says_where_each_example_begins():
    row = lay_end_to_end([Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [-100, 9])])
    assert {name: value if isinstance(value, int) else value.tolist() for name, value in row.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, 6, 7, -100, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
        "max_length_q": 3,
        "max_length_k": 3,
        "seq_idx": [[0, 0, 0, 1, 1]],
    }


def test_packed_rows_are_padded_with_an_example_of_which_nothing_is_learned():
    examples = [Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [-100, 9])]
    assert {name: value.tolist() for name, value in lay_in_rows(examples, Batching(2, 4, True), 0).items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "labels": [[-100, 6, 7], [-100, 9, -100]],
        "position_ids": [[0, 1, 2], [0, 1, 0]],
        "seq_idx": [[0, 0, 0], [0, 0, 1]],
    }
    assert lay_in_rows(examples, Batching(2, 5, True), 0)["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert lay_in_rows(examples, Batching(2, 4, True, one_row=True), 0)["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
