"""Every row is accounted for: an example, or a count with its source."""

import pytest

from lora_sft.data.conversation import Conversation
from lora_sft.errors import DataError, TemplateError
from lora_sft.model.tokenizer import prepare_speech
from lora_sft.training.preparation import prepare
from tests.conftest import conversation

SHORT = Conversation(conversation("hi", "yo"), source="a:1")
LONG = Conversation(conversation("hi", "yo " * 50), source="a:2")
LONG_QUESTION = Conversation(conversation("hi " * 50, "yo"), source="a:3")


@pytest.fixture
def speech(tokenizer):
    return prepare_speech(tokenizer)


def test_long_rows_are_dropped_and_counted(speech):
    found = prepare([SHORT, LONG], speech, max_length=30)
    assert ([example.source for example in found.examples], found.too_long, found.cut) == (["a:1"], ["a:2"], 0)


def test_long_rows_are_cut_if_asked_for_and_those_without_a_reply_left_are_dropped(speech):
    found = prepare([SHORT, LONG, LONG_QUESTION], speech, max_length=30, truncation="cut")
    assert ([example.source for example in found.examples], found.cut, found.without_reply) == (
        ["a:1", "a:2"],
        1,
        ["a:3"],
    )
    assert max(len(example.input_ids) for example in found.examples) == 30


def test_long_rows_are_an_error_if_asked_for(speech):
    with pytest.raises(DataError, match="row a:2 is longer than max_length 30"):
        prepare([SHORT, LONG], speech, max_length=30, truncation="error")


def test_nothing_left_is_an_error(speech):
    with pytest.raises(DataError, match="nothing is left to learn: 1 too long"):
        prepare([LONG], speech, max_length=30)


def test_counts_add_up(speech):
    found = prepare([SHORT, LONG], speech, max_length=4096)
    assert found.tokens == sum(len(example.input_ids) for example in found.examples)
    assert found.supervised_tokens == sum(example.supervised_tokens for example in found.examples)


def test_a_template_that_never_stops_is_refused_with_the_row(speech):
    speech.tokenizer.chat_template = (
        "{% for m in messages if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(TemplateError, match="a:1: reply 1: the template does not end the reply"):
        prepare([SHORT], speech, max_length=30)
