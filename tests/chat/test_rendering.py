"""Which characters the model must produce: the reply through its first stop token, nothing else."""

import json

import pytest

from lora_sft.chat.rendering import render
from lora_sft.chat.stops import stop_tokens_of
from lora_sft.chat.turns import DROPPED, HISTORY_DIFFERS, MARKS_DIFFER, NO_STOP_TOKEN, PROMPT_MISMATCH, STOP_GUESSED
from lora_sft.errors import TemplateError
from tests.conftest import conversation

OPEN = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
CLOSE = (
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


PLAIN_OPEN = OPEN.replace("{% generation %}", "")
PLAIN_CLOSE = CLOSE.replace("{% endgeneration %}", "")


def learned(template: str, tokenizer, *turns: str) -> list[str]:
    rendered = render(conversation(*turns), tokenizer, chat_template=template)
    return [rendered.text[start:end] for start, end in rendered.supervised]


def test_nothing_behind_the_first_stop_token_is_learned(tokenizer):
    template = OPEN + "{{ m.content }}<|im_end|>\n<|im_end|>\n" + CLOSE
    assert learned(template, tokenizer, "hi", "yo") == ["yo<|im_end|>"]


def test_a_stop_token_right_behind_the_block_is_learned(tokenizer):
    template = OPEN + "{{ m.content }}" + CLOSE.replace("{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
    assert learned(template, tokenizer, "hi", "yo") == ["yo<|im_end|>"]


def test_a_reply_equal_to_the_question_is_not_taken_for_it(tokenizer):
    rendered = render(conversation("same", "same"), tokenizer)
    ((start, end),) = rendered.supervised
    assert rendered.text[start:end] == "same<|im_end|>"
    assert start > rendered.text.index("assistant")


def test_a_reply_without_a_stop_token_is_noted(tokenizer):
    template = PLAIN_OPEN + "{{ m.content }}\n" + PLAIN_CLOSE
    rendered = render(conversation("hi", "yo", "hi", "yo"), tokenizer, chat_template=template)
    assert [(note.turn, note.status) for note in rendered.notes] == [(0, NO_STOP_TOKEN), (1, NO_STOP_TOKEN)]


NEXT_ROLE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
NEXT_ROLE += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
"""Ends a reply with the opening token of whoever comes next, as GLM does."""


def test_a_reply_may_end_with_the_next_turns_opening_token(tokenizer):
    talk = conversation("hi", "yo", "and?", "so")
    rendered = render(talk, tokenizer, chat_template=NEXT_ROLE, stop_tokens=["<|user|>"])
    assert [rendered.text[start:end] for start, end in rendered.supervised] == ["yo<|user|>", "so"]
    assert [(note.turn, note.status) for note in rendered.notes] == [(1, NO_STOP_TOKEN)]


def test_the_stop_token_that_is_put_in_is_the_one_that_the_template_uses(tokenizer):
    stops = ["<|im_end|>", "<|user|>"]
    for talk in (conversation("hi", "yo", "and?", "so"), conversation("hi", "so")):
        rendered = render(talk, tokenizer, chat_template=NEXT_ROLE, stop_tokens=stops, append_stop_token=True)
        assert rendered.text.endswith("<|assistant|>so<|user|>")
        start, end = rendered.supervised[-1]
        assert (rendered.text[start:end], rendered.notes) == ("so<|user|>", [])


def test_a_special_token_where_a_stop_would_stand_is_taken_for_it(tokenizer):
    rendered = render(conversation("hi", "yo"), tokenizer, stop_tokens=["<|endoftext|>"])
    assert [(note.status, note.words) for note in rendered.notes] == [
        (STOP_GUESSED, "<|im_end|> is taken for its stop token")
    ]
    start, end = rendered.supervised[0]
    assert rendered.text[start:end] == "yo<|im_end|>"


def test_a_templates_own_marks_are_compared_with_what_must_be_produced(tokenizer):
    """Vendors' marks often cover the line break behind the stop token, or the header."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}assistant: {{ m.content }}<|im_end|>"
        "{{ '\n' }}{% endgeneration %}{% else %}user: {{ m.content }}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    rendered = render(conversation("hi", "yo"), tokenizer, chat_template=template)
    assert [(note.status, note.words) for note in rendered.notes] == [
        (MARKS_DIFFER, "the template's own marks also cover 'assistant: '"),
        (MARKS_DIFFER, "the template's own marks also cover '\\n'"),
    ]


def test_a_mismatched_prompt_never_splits_a_tag(tokenizer):
    """The prompt opens `<think>`, the reply is a `<tool_call>`: they share `<t`, and the whole tag is learned."""
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:<think>' }}{% endif %}"
    )
    rendered = render(conversation("hi", "<tool_call>x</tool_call>"), tokenizer, chat_template=template)
    assert [rendered.text[start:end] for start, end in rendered.supervised] == ["<tool_call>x</tool_call><|im_end|>"]
    assert [note.status for note in rendered.notes] == [PROMPT_MISMATCH]


def test_without_a_generation_prompt_all_that_is_written_for_a_reply_is_learned(tokenizer):
    """Here the history differs too: the newest question is marked. The reply's own opening is the model's to write."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[NEW]' if messages | length < loop.index + 2 else '[OLD]' }}{{ m.content }}"
        "{% else %}{{ '>> ' ~ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    rendered = render(conversation("hi", "yo", "and?", "so"), tokenizer, chat_template=template)
    assert [rendered.text[start:end] for start, end in rendered.supervised] == [">> yo<|im_end|>", ">> so<|im_end|>"]
    assert [(note.turn, note.status) for note in rendered.notes] == [(0, HISTORY_DIFFERS)]


def test_typed_parts_that_the_template_would_print_are_noted(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "yo"}]
    rendered = render(parts, tokenizer, chat_template=PLAIN_OPEN + "{{ m.content }}<|im_end|>" + PLAIN_CLOSE)
    assert [(note.status, note.words) for note in rendered.notes] == [
        (DROPPED, "the template writes the typed parts of message 1 as Python prints them; give its content as text")
    ]


def test_words_that_the_template_leaves_out_are_noted(tokenizer):
    rendered = render(conversation("hi", "yo"), tokenizer, chat_template=OPEN + "{{ m.content[:1] }}<|im_end|>" + CLOSE)
    assert [note.status for note in rendered.notes] == [DROPPED]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% generation %}x{% endgeneration %}{{ raise_exception('not like that') }}", "not like that"),
        ("{% generation %}x", "fails on this conversation"),
        (
            # Thrown eight times, so that the two renderings never agree by luck.
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% for i in range(8) %}{{ range(100000) | random }}{% endfor %}",
            "cannot be traced",
        ),
    ],
)
def test_a_template_that_cannot_serve_is_refused(template, words, tokenizer):
    with pytest.raises(TemplateError, match=words):
        render(conversation("a", "b", "c", "d"), tokenizer, chat_template=template)


def test_a_reply_for_which_nothing_is_written_is_noted(tokenizer):
    rendered = render(conversation("hi", "yo"), tokenizer, chat_template="{{ messages[0].content }}")
    assert (rendered.text, rendered.supervised) == ("hi", [])
    assert [(note.status, note.words) for note in rendered.notes] == [(DROPPED, "the template writes nothing for it")]


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="the model has no chat template; choose one with chat_template"):
        render(conversation("hi", "yo"), tokenizer)


def test_stop_tokens_are_the_eos_and_those_of_the_generation_config(tokenizer, tmp_path):
    assert stop_tokens_of(tokenizer) == ["<|im_end|>"]
    assert stop_tokens_of(tokenizer, [0, 2]) == ["<|im_end|>", "<|endoftext|>"]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    tokenizer.name_or_path = str(tmp_path)
    assert stop_tokens_of(tokenizer) == ["<|im_end|>", "<|endoftext|>"]


def test_a_reply_marked_as_not_learned_is_shown_and_not_learned(tokenizer):
    messages = conversation("hi", "yo", "and?", "yes")
    messages[1]["train"] = False
    rendered = render(messages, tokenizer)
    assert [rendered.text[start:end] for start, end in rendered.supervised] == ["yes<|im_end|>"]
    assert "yo<|im_end|>" in rendered.text


def test_reasoning_that_a_template_does_not_know_is_noted(tokenizer):
    messages = conversation("hi", "yo")
    messages[1]["reasoning_content"] = "hm"
    template = OPEN + "{{ m.content }}<|im_end|>" + CLOSE
    assert [note.words for note in render(messages, tokenizer, chat_template=template).notes] == [
        "the template leaves out its reasoning"
    ]
    assert not render(messages, tokenizer).notes


def test_variables_reach_the_template(tokenizer):
    template = "{% if loud %}LOUD {% endif %}" + OPEN + "{{ m.content }}<|im_end|>" + CLOSE
    assert render(conversation("hi", "yo"), tokenizer, chat_template=template, loud=True).text.startswith("LOUD user")
