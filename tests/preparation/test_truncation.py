"""Rows that are too long: what is kept, cut and dropped adds up, whatever the policy."""

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_sft.data.conversation import Conversation
from lora_sft.errors import DataError
from lora_sft.model.tiny import tiny_tokenizer
from lora_sft.model.tokenizer import prepare_speech
from lora_sft.preparation.prepare import prepare
from lora_sft.preparation.shortening import shortened

SPEECH = prepare_speech(tiny_tokenizer(["so it is"], 300))
STOP = SPEECH.tokenizer.eos_token_id

texts = st.text("ab ", min_size=1, max_size=12).filter(str.strip)


@st.composite
def talks(draw):
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 5))):
        messages += [{"role": "user", "content": draw(texts)}, {"role": "assistant", "content": draw(texts)}]
        if draw(st.booleans()):
            messages.append({"role": "assistant", "content": draw(texts)})
    return Conversation(messages, source="a:1")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(talks(), min_size=1, max_size=4),
    st.integers(20, 120),
    st.sampled_from(["drop", "oldest", "newest", "cut"]),
)
def test_kept_and_cut_and_dropped_are_all_there_was(conversations, max_length, truncation):
    whole = prepare(conversations, SPEECH, max_length=100_000).supervised_tokens
    with contextlib.suppress(DataError):  # nothing is left to learn
        found = prepare(conversations, SPEECH, max_length, truncation)
        check(found, whole, max_length, truncation)


def check(found, whole, max_length, truncation):
    assert found.supervised_tokens + found.tokens_cut + found.tokens_dropped == whole
    assert found.longest <= max_length
    if truncation != "cut":
        assert all(last_learned(example) == STOP for example in found.examples)


def last_learned(example) -> int:
    return next(label for label in reversed(example.labels) if label != -100)


def talk(*contents: str) -> Conversation:
    roles = {"s": "system", "q": "user", "a": "assistant", "t": "tool"}
    return Conversation([{"role": roles[content[0]], "content": content} for content in contents])


@pytest.mark.parametrize(
    ("which", "limit", "kept"),
    [
        ("oldest", 5, ["s0", "q2", "a2", "q3", "a3"]),
        ("oldest", 3, ["s0", "q3", "a3"]),
        ("newest", 5, ["s0", "q1", "a1", "t1", "a1"]),
        ("newest", 7, ["s0", "q1", "a1", "t1", "a1", "q2", "a2"]),
        ("oldest", 2, None),
        ("newest", 4, None),
    ],
)
def test_whole_turns_are_left_out_and_the_system_prompt_stays(which, limit, kept):
    whole = talk("s0", "q1", "a1", "t1", "a1", "q2", "a2", "q3", "a3")
    found = shortened(whole, which, lambda one: len(one.messages) <= limit)
    assert kept == (found and [message["content"] for message in found.messages])
