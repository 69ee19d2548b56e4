"""Every row is accounted for: an example, or a count with its source."""

import pytest

from lora_sft.data.conversation import Conversation
from lora_sft.errors import DataError, TemplateError
from lora_sft.model.tokenizer import prepare_speech
from lora_sft.preparation.prepare import prepare
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


NO_STOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_STOP += "{% if add_generation_prompt %}assistant: {% endif %}"


def learned(prepared, speech):
    """What is learned of each example."""
    return [speech.tokenizer.decode([t for t in example.labels if t != -100]) for example in prepared.examples]


def test_a_template_that_never_stops_is_refused_with_the_row(speech):
    speech.tokenizer.chat_template = NO_STOP
    with pytest.raises(TemplateError, match=r"a:1, reply 1: the template does not end the reply.*append_stop_token"):
        prepare([SHORT], speech, max_length=30)


def test_a_stop_token_is_put_in_if_asked_for(speech):
    speech.tokenizer.chat_template = NO_STOP
    talk = Conversation(conversation("hi", "yo", "and?", "<|im_end|>"), source="a:4")
    found = prepare([SHORT, talk], speech, max_length=300, append_stop_token=True)
    assert learned(found, speech) == ["yo<|im_end|>", "yo<|im_end|><|im_end|><|im_end|>"]
    assert speech.tokenizer.decode(found.examples[0].input_ids) == "user: hi\nassistant: yo<|im_end|>\n"
    stop = speech.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [example.labels.count(stop) for example in found.examples] == [1, 2]  # the one in the data stays text


def test_a_missing_stop_token_can_be_accepted(speech):
    speech.tokenizer.chat_template = NO_STOP
    found = prepare([SHORT], speech, max_length=300, allow=["no_stop_token"])
    assert learned(found, speech) == ["yo"]
    assert list(found.noted) == ["no stop token"]


def test_words_that_the_template_drops_are_refused_once_for_all_rows(speech):
    thinking = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    speech.tokenizer.chat_template = NO_STOP.replace("\n", "<|im_end|>")
    rows = [Conversation(thinking, source=f"a:{n}") for n in range(1, 6)]
    with pytest.raises(TemplateError, match=r"a:1, reply 1: the template leaves out its reasoning \(5 times\)"):
        prepare(rows, speech, max_length=300)
    found = prepare(rows, speech, max_length=300, allow=["dropped"])
    assert (len(found.examples), found.noted["dropped"]) == (5, 5)


def test_a_conversation_in_which_nothing_is_learned_is_refused(speech):
    silent = Conversation(conversation("hi"), source="a:9")
    with pytest.raises(DataError, match="a:9: no reply is learned; nothing is learned from them"):
        prepare([SHORT, silent], speech, max_length=300)
    found = prepare([SHORT, silent], speech, max_length=300, allow=["no_reply"])
    assert (len(found.examples), found.without_reply) == (1, ["a:9"])


def test_only_the_last_reply_is_learned_if_asked_for(speech):
    talk = Conversation(conversation("hi", "yo", "and?", "more"), source="a:4")
    assert learned(prepare([talk], speech, max_length=300, turns="last"), speech) == ["more<|im_end|>"]


def test_several_processes_prepare_the_same(speech):
    rows = [Conversation(conversation(f"what is {n}?", f"it is {n}"), source=f"a:{n}") for n in range(50)]
    assert prepare(rows, speech, max_length=300, processes=2) == prepare(rows, speech, max_length=300)


def test_an_error_in_another_process_names_its_row(speech):
    rows = [Conversation(conversation(f"what is {n}?", f"it is {n}"), source=f"a:{n}") for n in range(50)]
    speech.tokenizer.chat_template = "{{ raise_exception('no') if 'it is 41' in messages[1].content }}"
    with pytest.raises(TemplateError, match="a:41: the chat template fails on this conversation: no"):
        prepare(rows, speech, max_length=300, processes=2)
