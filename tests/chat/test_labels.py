"""Tokens and labels: what is learned, seen through the tokenizer's own decoding."""

import pytest

from lora_sft.chat.labels import encode, encode_rendered
from lora_sft.chat.rendering import Rendered
from lora_sft.errors import ModelError
from tests.conftest import conversation


def learned_text(example, tokenizer) -> str:
    return tokenizer.decode(
        [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != -100]
    )


@pytest.mark.parametrize(
    ("turns", "learned"),
    [
        (("hi", "yo"), "yo<|im_end|>"),
        (("hi", "yo", "and?", "yes"), "yo<|im_end|>yes<|im_end|>"),
        (("hi", ""), "<|im_end|>"),
        (("hi", "  two spaces \n"), "  two spaces \n<|im_end|>"),
        (("🙂", "naïve 🙃 日本"), "naïve 🙃 日本<|im_end|>"),
        (("say yo", "yo", "say more"), "yo<|im_end|>"),
    ],
)
def test_only_the_reply_and_its_end_token_are_learned(turns, learned, tokenizer):
    example = encode(conversation(*turns), tokenizer)
    assert learned_text(example, tokenizer) == learned


def test_labels_are_the_ids_or_minus_100(tokenizer):
    example = encode(conversation("hi", "yo"), tokenizer)
    assert len(example.input_ids) == len(example.labels)
    assert all(label in (token, -100) for token, label in zip(example.input_ids, example.labels, strict=True))
    assert example.supervised_tokens == sum(label != -100 for label in example.labels)


def test_the_tokens_are_those_of_the_template_without_another_bos(tokenizer):
    messages = conversation("hi", "yo")
    assert (
        encode(messages, tokenizer).input_ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    )


def test_a_token_across_the_start_of_a_reply_is_split_there(tokenizer):
    whole = tokenizer.tokenize("the library")
    rendered = Rendered("the library", [(1, 11)])
    assert len(whole) < 11
    example = encode_rendered(rendered, tokenizer)
    assert learned_text(example, tokenizer) == "he library"
    assert tokenizer.decode(example.input_ids) == "the library"


def test_white_space_is_learned_with_tokenizers_that_report_it_as_empty(tokenizer):
    from tokenizers.processors import ByteLevel

    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    example = encode(conversation("a", "b:\n        c\n"), tokenizer)
    assert learned_text(example, tokenizer) == "b:\n        c\n<|im_end|>"


def test_max_length_cuts_and_counts(tokenizer):
    whole = encode(conversation("hi", "yo"), tokenizer)
    cut = encode(conversation("hi", "yo"), tokenizer, max_length=5)
    assert (cut.input_ids, cut.labels, cut.cut) == (whole.input_ids[:5], whole.labels[:5], len(whole.input_ids) - 5)


def test_a_tokenizer_without_offsets_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ModelError, match="no offsets"):
        encode(conversation("hi", "yo"), tokenizer)
