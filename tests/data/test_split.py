"""Conversations kept out of training for evaluation."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_sft.data.conversation import Conversation
from lora_sft.data.split import split, split_off
from lora_sft.errors import DataError

TEN = [Conversation(source=str(number)) for number in range(10)]
DICE = random.Random(5)


def talk(question, answer, system=""):
    first = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(first + turns)


def words(count):
    return " ".join(f"word{DICE.randrange(10**6)}" for _ in range(count))


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


def test_near_duplicates_stand_on_one_side():
    answers = [words(60) for _ in range(50)]
    talks = [talk(str(group), f"{answer} {end}") for group, answer in enumerate(answers) for end in ("one", "two")]
    train, held_out = split_off(talks, 0.2, seed=1)
    groups = [{one.messages[0]["content"] for one in side} for side in (train, held_out)]
    assert len(held_out) == 20
    assert not groups[0] & groups[1]


def test_the_description_says_how_duplicates_steered_the_split():
    talks = [talk("hi", "yo"), talk("Hi!", "Yo."), *(talk(words(5), words(5)) for _ in range(4))]
    assert split(talks, 1, seed=1).describe() == (
        "1 of 6 conversations held out; 2 have near-duplicates, in a group of 2: each group stays on one side"
    )


def test_a_size_that_the_groups_cannot_meet_is_met_as_nearly_as_they_can():
    talks = [talk(letter, letter * 3) for letter in "aaabbbccccc"]
    found = split(talks, 4, seed=1)
    assert len(found.held_out) in (3, 5)
    assert found.describe().startswith(f"{len(found.held_out)} of 11 conversations held out (4 asked for)")


def test_groups_are_swapped_until_the_size_is_met():
    talks = [talk(letter, letter * 3) for letter in "aaabbbcccc"]
    for seed in range(10):
        assert len(split_off(talks, 6, seed)[1]) == 6
        assert len(split_off(talks, 7, seed)[1]) == 7


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.data())
def test_groups_stay_whole_and_no_side_is_empty(sizes, data):
    talks = [talk(f"{group}", f"{group}") for group, size in enumerate(sizes) for _ in range(size)]
    count = data.draw(st.integers(1, len(talks) - 1))
    train, held_out = split_off(talks, count, data.draw(st.integers(0, 9)))
    sides = [{one.messages[0]["content"] for one in side} for side in (train, held_out)]
    assert train
    assert held_out
    assert not sides[0] & sides[1]
    # One more group, or one less, would not be nearer.
    assert abs(len(held_out) - count) <= max(sizes)


def test_copies_of_one_conversation_cannot_be_split():
    with pytest.raises(DataError, match=r"all 10 conversations are near-duplicates of each other.*eval_dataset"):
        split_off([talk("hi", "yo")] * 10, 2, seed=1)


def test_a_system_prompt_that_all_share_makes_no_duplicates():
    system = words(300)
    talks = [talk(words(5), words(5), system) for _ in range(10)]
    assert split(talks, 2, seed=1).alike == 0


def test_tool_calls_are_compared_too():
    def called(place):
        calls = [{"type": "function", "function": {"name": "weather", "arguments": {"place": place}}}]
        return Conversation(
            [{"role": "user", "content": "And there?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        )

    assert split([called("Oslo"), called("Bergen"), called("Oslo")], 1, seed=1).alike == 2


def test_texts_and_tokens_are_compared_as_they_are():
    texts = [
        Conversation(text="once upon a time"),
        Conversation(text="another"),
        Conversation(text="Once upon a time."),
    ]
    tokens = [Conversation(input_ids=list(range(start, start + 9))) for start in (1, 50, 1)]
    assert (split(texts, 1, seed=1).alike, split(tokens, 1, seed=1).alike) == (2, 2)


def test_a_form_in_the_question_is_no_reason_to_keep_everything_together():
    form = words(200)
    talks = [talk(f"{form} {words(12)}", "yes") for _ in range(100)]
    assert len(split_off(talks, 0.1, seed=1)[1]) == 10
