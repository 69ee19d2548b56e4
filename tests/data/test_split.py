"""Conversations kept out of training for evaluation."""

import pytest

from lora_sft.data.conversation import Conversation
from lora_sft.data.split import split_off
from lora_sft.errors import DataError

TEN = [Conversation(source=str(number)) for number in range(10)]


@pytest.mark.parametrize(("size", "count"), [(0.2, 2), (3, 3), (0.01, 1), (0, 0)])
def test_a_share_or_a_number_is_kept_out_and_nothing_is_lost(size, count):
    train, held_out = split_off(TEN, size, seed=1)
    assert len(held_out) == count
    assert sorted([*train, *held_out], key=lambda one: one.source) == TEN


def test_the_seed_decides_which():
    assert split_off(TEN, 3, seed=1) == split_off(TEN, 3, seed=1)
    assert split_off(TEN, 3, seed=1) != split_off(TEN, 3, seed=2)


def test_something_must_be_left_to_train_on():
    with pytest.raises(DataError, match="nothing is left to train on"):
        split_off(TEN, 10, seed=1)
