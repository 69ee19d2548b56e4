"""The templates that ship with the package, held against the published ones, and what each gives to be learned."""

import json
from datetime import datetime
from importlib.resources import files

import pytest
from jinja2 import TemplateError as JinjaError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.chat_template_utils import render_jinja_template

from lora_sft.chat.rendering import render, with_aliases
from lora_sft.chat.templates import find_template, shipped_templates
from lora_sft.chat.turns import HARMFUL, MARKS_DIFFER
from lora_sft.errors import TemplateError

FOLDER = files("trl") / "chat_templates"
NAMES = [template.name for template in shipped_templates()]
EOS = "the tokenizer's eos"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "description": "n", "default": 3},
        "kind": {"type": "string", "enum": ["x", "y"], "description": "which"},
        "names": {"type": "array", "items": {"type": "string"}},
        "rows": {"type": "array", "items": {"type": "object", "properties": {"k": {"type": "string"}}}},
        "where": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
        "text": {"type": "string", "nullable": True},
    },
    "required": ["a"],
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "adds", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "description": "tells the time"}},
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(number):
    function = {"name": "add", "arguments": {"a": number, "kind": 'é "q"', "rows": [{"k": None}, 1.5, True]}}
    return {"type": "function", "id": f"call{number:05}", "function": function}


def result(number):
    return {"role": "tool", "content": str(number), "name": "add", "tool_call_id": f"call{number:05}"}


SYSTEM = {"role": "system", "content": "S"}
TWO_TURNS = [SYSTEM, user("hi"), assistant("yo"), user("ok?"), assistant("ok")]
SCENARIOS = {
    "a question": [user("hi")],
    "one turn": [user("hi"), assistant("yo")],
    "a system message": [SYSTEM, user("hi"), assistant("yo")],
    "two turns": TWO_TURNS,
    "two turns and a question": [*TWO_TURNS, user("bye")],
    "no system message": TWO_TURNS[1:],
    "no system message and a question": [*TWO_TURNS[1:], user("bye")],
    "white space": [
        {"role": "system", "content": " S \n"},
        user(" hi\n"),
        assistant("  yo \n"),
        user("x "),
        assistant("\n\nyes"),
    ],
    "emoji": [user("🙂"), assistant("日本 🙃"), user("\u00a0é")],
    "an empty reply": [user("hi"), assistant(""), user("hi"), assistant("x")],
    "a thought": [SYSTEM, user("1?"), assistant("one", reasoning_content="hm\nso")],
    "thoughts": [
        user("1?"),
        assistant("one", reasoning_content="hm"),
        user("2?"),
        assistant("two", reasoning_content="\nso\n"),
    ],
    "an early thought": [user("1?"), assistant("one", reasoning_content="hm"), user("2?"), assistant("two")],
    "a thought and a question": [user("1?"), assistant("one", reasoning_content="hm"), user("2?")],
    "thoughts inside": [
        user("1?"),
        assistant("<think>\nhm\n</think>\n\none"),
        user("2?"),
        assistant("<think>\nx\n</think>\n\ntwo"),
    ],
    "a call": [user("1?"), assistant("", tool_calls=[call(1)])],
    "a call and its result": [SYSTEM, user("1?"), assistant("", tool_calls=[call(1)]), result(1)],
    "a call and the answer": [user("1?"), assistant("", tool_calls=[call(1)]), result(1), assistant("one")],
    "words and a call": [user("1?"), assistant("let me", tool_calls=[call(1)]), result(1), assistant("one")],
    "two calls at once": [
        user("1?"),
        assistant("", tool_calls=[call(1), call(2)]),
        result(1),
        result(2),
        assistant("one"),
        user("ok"),
        assistant("bye"),
    ],
    "a call after a call": [
        user("1?"),
        assistant("", tool_calls=[call(1)]),
        result(1),
        assistant("", tool_calls=[call(2)]),
        result(2),
        assistant("one"),
    ],
    "thoughts and a call": [
        user("1?"),
        assistant("", tool_calls=[call(1)], reasoning_content="hm"),
        result(1),
        assistant("one", reasoning_content="so"),
    ],
}


def told(template, messages, tools=None, **variables):
    """The text as transformers renders it; None if the template refuses the conversation."""
    try:
        texts, _ = render_jinja_template(
            [with_aliases(messages)], chat_template=template, tools=tools, **SPECIAL, **variables
        )
    except (JinjaError, TypeError, ValueError, KeyError, AttributeError):
        return None
    return texts[0]


# ── 1. The published templates ───────────────────────────────────────────────────────────────────────────────────────

TWINS = {
    "command-r": ["cohere"],
    "deepseek-r1": ["deepseek_r1_distill"],
    "deepseek-v3": ["deepseekv3"],
    "gemma2": ["gemma"],
    "gemma3": ["gemma3"],
    "gemma4": ["gemma4_v5"],
    "glm4": ["glm4moe"],
    "gpt-oss": ["gptoss"],
    "llama3": ["llama3"],
    "phi3": ["phi3", "phi3_5"],
    "qwen2.5": ["qwen2_5"],
    "qwen3": ["qwen3"],
    "qwen3-instruct": ["qwen3_instruct_2507"],
}
VARIABLES = {
    "gemma4": [{}, {"enable_thinking": True}, {"preserve_thinking": True}],
    "glm4": [{}, {"enable_thinking": False}],
    "gpt-oss": [{"date_string": datetime.now().strftime("%Y-%m-%d")}],
    "qwen3": [{}, {"enable_thinking": False}, {"enable_thinking": True}],
}
UNLIKE = {
    ("gemma4", "words and a call"): "theirs puts the words behind the result, where no model could have said them",
    ("deepseek-v3", "thoughts inside"): "theirs drops them, even from the last reply",
    ("deepseek-v3", "a call after a call"): "theirs opens the calls and the outputs only once",
    **dict.fromkeys(
        [("deepseek-r1", name) for name in ("a thought", "thoughts", "thoughts inside", "thoughts and a call")],
        "theirs shows no thought at all, so that nothing could be learned of thinking",
    ),
    **dict.fromkeys(
        [("deepseek-r1", name) for name in SCENARIOS if "call" in name],
        "theirs closes only a second call, and drops a call beside words",
    ),
}


def as_published(name, text, messages):
    """Our text without the little that we write otherwise always; the reason stands in each template's head."""
    if name == "glm4" and messages[-1]["role"] == "assistant":
        return text.removesuffix("<|observation|>" if messages[-1].get("tool_calls") else "<|user|>")
    if name == "deepseek-v3" and text.endswith("<｜Assistant｜>"):
        return f"{text}<think>\n"  # TRL's file is that of R1, which opens a thought
    return text


def as_they_take_it(name, messages):
    """Arguments as DeepSeek's templates need them: text that is put in as it is."""
    if not name.startswith("deepseek"):
        return messages
    taken = json.loads(json.dumps(messages))
    for message in taken:
        for each in message.get("tool_calls", []):
            each["function"]["arguments"] = json.dumps(each["function"]["arguments"], ensure_ascii=False)
    return taken


@pytest.mark.parametrize("name", TWINS)
def test_the_text_is_that_of_the_published_template(name):
    ours, compared = find_template(name).text, 0
    for twin in TWINS[name]:
        theirs = (FOLDER / f"{twin}.jinja").read_text(encoding="utf-8")
        for scenario, messages in SCENARIOS.items():
            asks = messages[-1]["role"] != "assistant"
            tools = TOOLS if "call" in scenario and "no place for tools" not in ours else None
            for variables in VARIABLES.get(name, [{}]):
                for prompt in [False, True] if asks else [False]:
                    more = {**variables, "add_generation_prompt": prompt}
                    mine = told(ours, messages, tools, **more)
                    published = told(theirs, as_they_take_it(name, messages), tools, **more)
                    if mine is None or published is None:
                        continue
                    is_same = as_published(name, mine, messages) == published
                    assert is_same == ((name, scenario) not in UNLIKE), (twin, scenario, more)
                    compared += is_same
    assert compared >= 9 * len(TWINS[name])


# ── 2. What is learned ───────────────────────────────────────────────────────────────────────────────────────────────

# Around each reply of two turns: what is learned before it, and behind it.
AROUND = {
    "alpaca": ("", "</s>"),
    "chatml": ("", "<|im_end|>"),
    "command-r": ("", "<|END_OF_TURN_TOKEN|>"),
    "deepseek-r1": ("", "<｜end▁of▁sentence｜>"),
    "deepseek-v3": ("", "<｜end▁of▁sentence｜>"),
    "gemma2": ("", "<end_of_turn>"),
    "gemma3": ("", "<end_of_turn>"),
    "gemma4": ("", "<turn|>"),
    "glm4": ("\n<think></think>\n", "<|user|>"),
    "gpt-oss": ("<|channel|>final<|message|>", "<|return|>"),
    "granite": ("", "<|end_of_text|>"),
    "llama2": (" ", " </s>"),
    "llama3": ("", "<|eot_id|>"),
    "llama4": ("", "<|eot|>"),
    "mistral-tekken": ("", "</s>"),
    "mistral-v1": (" ", "</s>"),
    "mistral-v3": (" ", "</s>"),
    "phi3": ("", "<|end|>"),
    "phi4": ("", "<|im_end|>"),
    "plain": (" ", "</s>"),
    "qwen2.5": ("", "<|im_end|>"),
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "qwen3-instruct": ("", "<|im_end|>"),
    "qwen3-thinking": ("\n</think>\n\n", "<|im_end|>"),
    "smollm3": ("", "<|im_end|>"),
    "vicuna": (" ", "</s>"),
    "zephyr": ("", "</s>"),
}
# An earlier reply that is written otherwise than the last.
EARLIER = {
    "gpt-oss": ("<|channel|>final<|message|>", "<|end|>"),
    "qwen3": ("", "<|im_end|>"),
    "qwen3-thinking": ("", "<|im_end|>"),
}
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
DEEPSEEK = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)
# A thought, if the format has a place for one, and a call.
CALLS = {
    "chatml": '<think>\nhm\n</think>\n\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
    "deepseek-r1": f"hm\n</think>\n\n{DEEPSEEK}",
    "deepseek-v3": DEEPSEEK,
    "gemma4": "<|channel>thought\nhm\n<channel|><|tool_call>call:add{a:1}<tool_call|><|tool_response>",
    "glm4": (
        "\n<think>hm</think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
        "<|observation|>"
    ),
    "gpt-oss": (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
        ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>'
    ),
    "granite": f"{HERMES}<|end_of_text|>",
    "llama4": '<|python_start|><|python_end|>{"name": "add", "parameters": {"a": 1}}<|eot|>',
    "mistral-tekken": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "call00001"}]</s>',
    "mistral-v3": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "call00001"}]</s>',
    "qwen2.5": f"{HERMES}<|im_end|>",
    "qwen3": f"<think>\nhm\n</think>\n\n{HERMES}<|im_end|>",
    "qwen3-instruct": f"{HERMES}<|im_end|>",
    "qwen3-thinking": f"hm\n</think>\n\n{HERMES}<|im_end|>",
    "smollm3": f"<think>\nhm\n</think>\n{HERMES}<|im_end|>",
}
THINKING = {name for name in NAMES if find_template(name).about["thinking"] != "no"}
TOOLLESS = sorted(set(NAMES) - set(CALLS))


def learned(name, messages, tokenizer, tools=None, **variables):
    """What is learned of a conversation; nothing may be lost, nor marked otherwise by the template itself."""
    template = find_template(name)
    tokenizer.add_tokens(template.about["tokens"].removeprefix("none").split(), special_tokens=True)
    stops = ["</s>"] if template.about["stop"] == EOS else template.about["stop"].split()
    rendered = render(messages, tokenizer, tools, template.text, stops, **SPECIAL, **variables)
    assert not [note for note in rendered.notes if note.status in (*HARMFUL, MARKS_DIFFER)]
    return [rendered.text[start:end] for start, end in rendered.supervised]


@pytest.mark.parametrize("name", NAMES)
def test_each_reply_is_learned_through_its_stop_token(name, tokenizer):
    (before, behind), (earlier, then) = AROUND[name], EARLIER.get(name, AROUND[name])
    assert learned(name, TWO_TURNS[1:], tokenizer) == [f"{earlier}yo{then}", f"{before}ok{behind}"]
    assert learned(name, TWO_TURNS[:3], tokenizer) == [f"{before}yo{behind}"]


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_learned_through_its_stop_token(name, tokenizer):
    small = {**call(1), "function": {"name": "add", "arguments": {"a": 1}}}
    thought = {"reasoning_content": "hm"} if name in THINKING else {}
    asked = [user("1?"), assistant(None, tool_calls=[small], **thought)]
    tools = None if name.startswith("deepseek") else TOOLS
    assert learned(name, asked, tokenizer, tools) == [CALLS[name]]
    replies = learned(name, [*asked, result(1), assistant("one", **thought)], tokenizer, tools)
    assert replies[0] == (CALLS[name] if name != "gpt-oss" else CALLS[name].split("assistant", 1)[1])
    assert replies[1].endswith("one" + AROUND[name][1])


@pytest.mark.parametrize("name", sorted(THINKING))
def test_the_thought_of_the_last_reply_is_learned_with_it(name, tokenizer):
    [reply] = learned(name, SCENARIOS["a thought"], tokenizer)
    assert reply.endswith("one" + AROUND[name][1])
    assert "hm\nso" in reply


@pytest.mark.parametrize("name", ["glm4", "qwen3", "smollm3"])
def test_a_thought_that_the_prompt_closes_is_not_learned(name, tokenizer):
    replies = learned(name, TWO_TURNS, tokenizer, enable_thinking=False)
    start = "\n" if name == "glm4" else ""
    assert replies == [f"{start}yo{AROUND[name][1]}", f"{start}ok{AROUND[name][1]}"]
    [reply] = learned(name, SCENARIOS["a thought"], tokenizer, enable_thinking=False)
    assert reply.startswith("hm\nso")  # the prompt opens it


# ── 3. What a format has no place for, and what it bears ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", TOOLLESS)
def test_what_has_no_place_is_refused(name, tokenizer):
    template = find_template(name).text
    with pytest.raises(TemplateError, match="no place for tools; chatml has"):
        render(TWO_TURNS, tokenizer, TOOLS, template, **SPECIAL)
    with pytest.raises(TemplateError, match="no place for tool calls and their results; chatml has"):
        render(SCENARIOS["a call and the answer"], tokenizer, None, template, **SPECIAL)


@pytest.mark.parametrize("name", sorted(set(NAMES) - THINKING))
def test_a_thought_is_refused_where_it_would_be_lost(name, tokenizer):
    with pytest.raises(TemplateError, match=r"no place for reasoning; [a-z0-9-]+ has"):
        render(SCENARIOS["a thought"], tokenizer, None, find_template(name).text, **SPECIAL)


@pytest.mark.parametrize("name", ["gpt-oss", "mistral-v3", "mistral-tekken"])
def test_calls_that_a_format_cannot_write_are_refused(name, tokenizer):
    calls = [call(1), call(2)] if name == "gpt-oss" else [{**call(1), "id": "call_0123456789"}]
    with pytest.raises(TemplateError, match=r"several calls in one message|nine letters and digits"):
        render([user("1?"), assistant("", tool_calls=calls)], tokenizer, TOOLS, find_template(name).text, **SPECIAL)


@pytest.mark.parametrize("name", NAMES)
def test_content_may_come_in_parts_of_text_and_in_no_others(name):
    template = find_template(name).text
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TWO_TURNS]
    assert told(template, parts) == told(template, TWO_TURNS) is not None
    assert told(template, [user([{"type": "image", "url": "x"}]), assistant("yo")]) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_without_bos_is_borne_and_one_with_it_has_it_once(name):
    template, messages = find_template(name).text, with_aliases(TWO_TURNS[:3])
    for bos in ({}, {"bos_token": None}):
        texts, _ = render_jinja_template([messages], chat_template=template, eos_token="</s>", **bos)
        assert "None" not in texts[0]
        assert told(template, messages).removeprefix("<s>") == texts[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_head_says_what_the_template_is(name):
    about = find_template(name).about
    lines = {"family", "models", "model_types", "stop", "tokens", "tools", "thinking", "source"}
    assert lines <= {line for line, words in about.items() if words}
    assert set(about["model_types"].split(", ")) <= {"any", *CONFIG_MAPPING_NAMES}
    assert about["stop"] == EOS or set(about["stop"].split()) <= set(about["tokens"].split())
    assert (about["tools"] == "no") == (name in TOOLLESS)
