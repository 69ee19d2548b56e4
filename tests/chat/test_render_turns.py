"""Replies as they are produced, where a template writes them otherwise once another message follows."""

import pytest

from lora_sft.chat.rendering import render, render_turns
from lora_sft.chat.turns import REWRITTEN
from tests.conftest import conversation

FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Shows the reasoning of a reply only while it is the last message, as Qwen3 does."""


def thinking(*turns: tuple[str, str, str]):
    """Question, reasoning and answer in turn."""
    return [
        message
        for question, reasoning, answer in turns
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, "reasoning_content": reasoning},
        )
    ]


def learned(rendered):
    return [rendered.text[start:end] for start, end in rendered.supervised]


def test_a_reply_that_is_written_otherwise_later_is_noted(tokenizer):
    rendered = render(thinking(("q", "hm", "a"), ("r", "so", "b")), tokenizer, chat_template=FORGETFUL)
    assert learned(rendered) == ["a<|im_end|>", "<think>so</think>b<|im_end|>"]
    assert [(note.turn, note.status) for note in rendered.notes] == [(0, REWRITTEN)]


def test_each_reply_is_learned_as_it_is_produced(tokenizer):
    talk = thinking(("q", "hm", "a"), ("r", "so", "b"), ("s", "ok", "c"))
    found = render_turns(talk, tokenizer, chat_template=FORGETFUL, turns="each")
    assert [learned(part) for part in found] == [
        ["<think>hm</think>a<|im_end|>"],
        ["<think>so</think>b<|im_end|>"],
        ["<think>ok</think>c<|im_end|>"],
    ]
    for index, part in enumerate(found):
        start, end = part.supervised[0]
        given = tokenizer.apply_chat_template(
            talk[: 2 * index + 1], chat_template=FORGETFUL, add_generation_prompt=True, tokenize=False
        )
        assert (part.text[:start], end, part.notes) == (given, len(part.text), [])


def test_replies_that_continue_one_another_share_a_sequence(tokenizer):
    """The template forgets the reasoning of all but the last; here only one reply has any."""
    template = FORGETFUL.replace("and loop.last", "and m.reasoning_content and loop.last")
    talk = [*conversation("q", "a", "r", "b"), *thinking(("s", "ok", "c")), *conversation("t", "d")]
    found = render_turns(talk, tokenizer, chat_template=template, turns="each")
    assert [learned(part) for part in found] == [
        ["a<|im_end|>", "b<|im_end|>", "<think>ok</think>c<|im_end|>"],
        ["d<|im_end|>"],
    ]


@pytest.mark.parametrize("turns", ["all", "each"])
def test_a_template_that_rewrites_nothing_gives_one_sequence(turns, tokenizer):
    talk = conversation("q", "a", "r", "b")
    assert render_turns(talk, tokenizer, turns=turns) == [render(talk, tokenizer)]


def test_a_reply_that_is_not_to_be_learned_gets_no_sequence(tokenizer):
    talk = thinking(("q", "hm", "a"), ("r", "so", "b"))
    talk[1]["train"] = False
    found = render_turns(talk, tokenizer, chat_template=FORGETFUL, turns="each")
    assert [learned(part) for part in found] == [["<think>so</think>b<|im_end|>"]]
    talk[3]["train"] = False
    assert [learned(part) for part in render_turns(talk, tokenizer, chat_template=FORGETFUL, turns="last")] == [[]]
