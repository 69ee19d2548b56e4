"""The templates that ship with the package render what their family's models were trained on."""

import pytest

from lora_sft.chat.rendering import render
from lora_sft.chat.templates import find_template
from lora_sft.errors import TemplateError

CONVERSATION = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "ok?"},
    {"role": "assistant", "content": "ok"},
]
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«yo<|im_end|>»\n"
        "<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\n«ok<|im_end|>»\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«yo<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nok?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«ok<|eot_id|>»"
    ),
    "zephyr": (
        "<|system|>\nS</s>\n<|user|>\nhi</s>\n<|assistant|>\n«yo</s>»\n<|user|>\nok?</s>\n<|assistant|>\n«ok</s>»\n"
    ),
}


def marked(rendered) -> str:
    """The text with what must be produced in «»."""
    text = rendered.text
    for start, end in reversed(rendered.supervised):
        text = text[:start] + "«" + text[start:end] + "»" + text[end:]
    return text


@pytest.mark.parametrize("template", [find_template(name) for name in EXPECTED], ids=lambda template: template.name)
def test_a_template_renders_its_format_and_marks_the_replies(template, tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    rendered = render(
        CONVERSATION, tokenizer, chat_template=template.text, stop_tokens=["<|im_end|>", "<|eot_id|>", "</s>"]
    )
    assert marked(rendered) == EXPECTED[template.name]
    assert not rendered.notes


def test_a_conversation_is_rendered_under_a_template_by_its_source_name_or_path(tokenizer, tmp_path):
    source = find_template("zephyr").text
    (tmp_path / "mine.jinja").write_text(source)
    rendered = [
        render(CONVERSATION, tokenizer, chat_template=t) for t in (source, "zephyr", str(tmp_path / "mine.jinja"))
    ]
    assert rendered[0] == rendered[1] == rendered[2]
    with pytest.raises(TemplateError, match='"zehpyr" is not one of'):
        render(CONVERSATION, tokenizer, chat_template="zehpyr")


def test_chatml_shows_tools_and_calls(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call], "reasoning_content": "hm"},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "one"},
    ]
    rendered = render(messages, tokenizer, tools=[{"type": "function", "function": {"name": "add"}}])
    line = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert [rendered.text[start:end] for start, end in rendered.supervised] == [
        f"<think>\nhm\n</think>\n\n{line}\n{line}<|im_end|>",
        "one<|im_end|>",
    ]
    assert '<tools>\n{"type": "function", "function": {"name": "add"}}\n</tools>' in rendered.text


@pytest.mark.parametrize("name", ["llama3", "zephyr"])
def test_a_template_without_tools_refuses_them_instead_of_dropping_them(name, tokenizer):
    template = find_template(name).text
    with pytest.raises(TemplateError, match="no place for tools"):
        render(CONVERSATION, tokenizer, tools=[{}], chat_template=template)
    with pytest.raises(TemplateError, match="no place for tool calls"):
        render([{"role": "tool", "content": "1"}], tokenizer, chat_template=template)


def test_a_template_is_found_by_name_or_path_and_a_missing_one_is_told(tmp_path):
    (tmp_path / "mine.jinja").write_text("{#\nfamily: Mine\n#}x")
    assert find_template(str(tmp_path / "mine.jinja")).about == {"family": "Mine"}
    with pytest.raises(TemplateError, match="is not one of alpaca, chatml, command-r, "):
        find_template("chatlm")
    with pytest.raises(TemplateError, match="no such file"):
        find_template("missing.jinja")
