"""Several sources become one order."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_sft.data.mixing import Share, apportion, describe, mix
from lora_sft.errors import DataError


def taken(order, source):
    return [row for index, row in order if index == source]


def test_sources_without_a_share_follow_each_other_whole():
    assert mix([Share("a", 2), Share("b", 3)], seed=1) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def test_no_source_is_no_mix():
    assert mix([], seed=1) == []


@pytest.mark.parametrize(("wish", "rows"), [({"count": 30}, 30), ({"fraction": 0.3}, 30), ({"fraction": 0.001}, 1)])
def test_a_count_or_a_fraction_is_a_sample_in_the_order_of_the_source(wish, rows):
    sample = taken(mix([Share("a", 100, **wish)], seed=1), 0)
    assert len(set(sample)) == rows
    assert sample == sorted(sample)


@pytest.mark.parametrize("wish", [{"count": 25}, {"fraction": 2.5}])
def test_more_than_there_is_repeats_rows_as_evenly_as_can_be(wish):
    times = Counter(taken(mix([Share("a", 10, **wish)], seed=1), 0))
    assert sorted(times.values()) == [2] * 5 + [3] * 5


def test_the_seed_decides_which_rows():
    share = [Share("a", 100, count=30)]
    assert mix(share, seed=1) == mix(share, seed=1)
    assert mix(share, seed=1) != mix(share, seed=2)


def test_the_sample_of_a_source_does_not_depend_on_the_others():
    alone = mix([Share("a", 100, count=30)], seed=1)
    beside = mix([Share("b", 50, count=10), Share("a", 100, count=30), Share("c", 7)], seed=1)
    assert taken(alone, 0) == taken(beside, 1)


def test_a_larger_sample_contains_the_smaller():
    small, large = (set(mix([Share("a", 100, count=count)], seed=1)) for count in (30, 60))
    assert small < large


def test_the_same_source_twice_is_sampled_twice():
    order = mix([Share("a", 100, count=30), Share("a", 100, count=30)], seed=1)
    assert taken(order, 0) != taken(order, 1)


def test_a_mix_by_weight_is_as_large_as_it_can_be():
    order = mix([Share("a", 100, weight=3), Share("b", 10, weight=1)], seed=1)
    assert describe([Share("a", 100), Share("b", 10)], order) == [("a", 100, 30, 0.75), ("b", 10, 10, 0.25)]
    assert len(set(order)) == 40


def test_decimal_weights_are_exact():
    order = mix([Share("a", 1000, weight=0.9), Share("b", 10, weight=0.1)], seed=1)
    assert [len(taken(order, source)) for source in (0, 1)] == [90, 10]


def test_a_mix_by_weight_may_be_smaller():
    order = mix([Share("a", 100, weight=2), Share("b", 10, weight=1)], seed=1, size=10)
    assert [len(taken(order, source)) for source in (0, 1)] == [7, 3]


def test_every_stretch_of_a_mix_by_weight_has_about_its_shares():
    order = mix([Share("a", 3000, weight=3), Share("b", 1000, weight=1)], seed=1)
    stretches = [len(taken(order[start : start + 40], 1)) for start in range(0, 4000, 40)]
    assert min(stretches) >= 7
    assert max(stretches) <= 13
    assert taken(order, 0) != sorted(taken(order, 0))


def test_replacement_repeats_the_rows_of_a_small_source_evenly():
    order = mix([Share("a", 90, weight=1), Share("b", 10, weight=1)], seed=1, replacement=True)
    assert len(order) == 100
    assert len(set(taken(order, 0))) == 50
    assert Counter(taken(order, 1)) == dict.fromkeys(range(10), 5)


def test_a_count_limits_a_source_before_its_weight():
    shares = [Share("a", 100, weight=1, count=5), Share("b", 100, weight=1)]
    assert len(mix(shares, seed=1)) == 10
    repeated = Counter(taken(mix(shares, seed=1, replacement=True, size=40), 0))
    assert sorted(repeated.values()) == [4] * 5


def test_a_source_that_runs_out_is_named_with_the_largest_size():
    with pytest.raises(DataError) as caught:
        mix([Share("a", 100, weight=3), Share("b", 10, weight=1)], seed=1, size=60)
    assert str(caught.value) == (
        "a mix of 60 rows with these weights runs out of b (has 10 rows, needs 15); the largest mix without repeats is "
        "40: lower the size, change the weights, or draw with replacement"
    )


@pytest.mark.parametrize(
    ("shares", "size", "words"),
    [
        ([Share("a", 9, weight=-1)], None, "a: weight is -1; use a number above 0, or leave the source out"),
        ([Share("a", 9, fraction=float("nan"))], None, "a: fraction is nan; use a number above 0"),
        ([Share("a", 9, count=0)], None, "a: count is 0; use a whole number above 0"),
        ([Share("a", 9, count=1, fraction=0.5)], None, "a: has count 1 and fraction 0.5; give one of the two"),
        ([Share("a", 0, count=1)], None, "a: has no rows to take a share of"),
        ([Share("a", 9, weight=1), Share("b", 9)], None, "b: no weight, but other sources have one"),
        ([Share("a", 9)], 5, "size 5 is for a mix by weight; give every source a weight"),
        ([Share("a", 9, weight=1)], 0, "the size of the mix is 0; use a whole number above 0"),
    ],
)
def test_shares_that_make_no_sense_say_so(shares, size, words):
    with pytest.raises(DataError) as caught:
        mix(shares, seed=1, size=size)
    assert words in str(caught.value)


def test_all_wrong_shares_are_told_at_once():
    with pytest.raises(DataError, match=r"2 problems:\n- a: .*\n- b: "):
        mix([Share("a", 9, count=-1), Share("b", 9, fraction=0)], seed=1)


@given(st.integers(0, 500), st.lists(st.fractions(min_value=Fraction(1, 100), max_value=100), min_size=1, max_size=8))
def test_apportioned_numbers_add_up_and_are_within_one_of_their_share(total, weights):
    counts = apportion(total, weights)
    assert sum(counts) == total
    assert all(abs(count - total * weight / sum(weights)) < 1 for count, weight in zip(counts, weights, strict=True))


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=5), st.integers(0, 3))
def test_without_replacement_no_row_comes_twice_and_one_source_is_nearly_used_up(sources, seed):
    shares = [Share(str(index), rows, weight=weight) for index, (rows, weight) in enumerate(sources)]
    order = mix(shares, seed)
    whole = sum(weight for _, weight in sources)
    assert len(set(order)) == len(order)
    assert any((len(order) + 1) * weight > rows * whole for rows, weight in sources)
