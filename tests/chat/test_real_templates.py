"""Real chat templates: TRL ships many, most with a twin whose reply is marked by hand. An independent answer key."""

import re
from importlib.resources import files

import pytest
from jinja2 import TemplateError as JinjaError
from transformers.utils.chat_template_utils import render_jinja_template

from lora_sft.chat.rendering import render, with_aliases
from lora_sft.chat.tracing import compile_traced
from lora_sft.chat.turns import HARMFUL, NO_STOP_TOKEN
from lora_sft.errors import TemplateError

FOLDER = files("trl") / "chat_templates"
TEMPLATES = {file.name.removesuffix(".jinja"): file for file in sorted(FOLDER.iterdir(), key=lambda f: f.name)}
TEMPLATES.pop("README.md", None)
ORIGINALS = [name for name in TEMPLATES if not name.endswith("_training")]
TWINS = [name for name in ORIGINALS if f"{name}_training" in TEMPLATES]

# The tokens with which each family's models stop; the same for all templates, as a model has only its own anyway.
STOPS = (
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "<|user|>",
    "<|observation|>",
    "<|endoftext|>",
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "adds",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "description": "n"}},
                "required": ["a"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


RESULT = {"role": "tool", "content": "3", "name": "add"}
SCENARIOS = {
    "simple": [user("hi"), assistant("yo")],
    "system": [{"role": "system", "content": "S"}, user("hi"), assistant("yo")],
    "many turns": [user("hi"), assistant("yo"), user("more"), assistant("ok"), user("bye"), assistant("bye")],
    "white space": [user(" hi\n"), assistant("  yo \n"), user("x"), assistant("\n\nindeed")],
    "the same words": [user("same"), assistant("same"), user("same"), assistant("same")],
    "emoji": [user("🙂"), assistant("日本 🙃")],
    "empty reply": [user("hi"), assistant(""), user("hi"), assistant("x")],
    "ends with the user": [user("hi"), assistant("yo"), user("??")],
    "quoted markers": [
        user("<|im_start|>assistant\nfoo<|im_end|>"),
        assistant("a <|im_start|>user\nfoo"),
        user("x"),
        assistant("y"),
    ],
    "thinking": [
        user("1?"),
        assistant("one", reasoning_content="hm"),
        user("2?"),
        assistant("two", reasoning_content="so"),
    ],
    "thinking inside": [
        user("q"),
        assistant("<think>\nhm\n</think>\n\nans"),
        user("r"),
        assistant("<think>\nx\n</think>\n\nb"),
    ],
    "a tool call": [user("1?"), assistant("", tool_calls=[CALL]), RESULT, assistant("three")],
    "parallel calls": [
        user("1?"),
        assistant("let me", tool_calls=[CALL, CALL]),
        RESULT,
        RESULT,
        assistant("three"),
        user("ok"),
        assistant("bye"),
    ],
    "consecutive replies": [user("hi"), assistant("yo"), assistant("and more")],
    "starts with the assistant": [assistant("welcome"), user("hi"), assistant("yo")],
}


# Where the hand-made key itself is wrong: it marks the header of a second reply in a row as said by the assistant.
TWIN_ERRS = {(name, "consecutive replies") for name in ("deepseek_r1_distill", "deepseekv3", "gptoss")}


def variables(scenario):
    tools = TOOLS if "call" in scenario else None
    return {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "tools": tools}


def plain(name, messages, scenario, **more):
    """The text as transformers renders it; None if the template refuses the conversation."""
    source = TEMPLATES[name].read_text(encoding="utf-8")
    try:
        texts, blocks = render_jinja_template([messages], chat_template=source, **(variables(scenario) | more))
    except (JinjaError, TypeError, ValueError, KeyError, AttributeError):
        return None
    return (texts[0], blocks[0]) if more.get("return_assistant_tokens_mask") else texts[0]


def ours(name, messages, scenario, tokenizer):
    special = {key: value for key, value in variables(scenario).items() if key != "tools"}
    source = TEMPLATES[name].read_text(encoding="utf-8")
    return render(messages, tokenizer, variables(scenario)["tools"], source, STOPS, **special)


def ours_or_why_not(*arguments):
    try:
        return ours(*arguments)
    except TemplateError as error:
        return str(error)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_traced_text_is_that_of_transformers(scenario):
    for name in TEMPLATES:
        expected = plain(name, SCENARIOS[scenario], scenario)
        if expected is not None:
            compiled = compile_traced(TEMPLATES[name].read_text(encoding="utf-8"))
            more = variables(scenario) | {"documents": None, "add_generation_prompt": False}
            assert compiled.render(with_aliases(SCENARIOS[scenario]), more) == expected, name


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_word_of_anybody_else_is_learned_and_every_word_of_a_reply_is(scenario, tokenizer):
    messages = SCENARIOS[scenario]
    for name in ORIGINALS:
        if plain(name, messages, scenario) is None:
            continue
        rendered = ours_or_why_not(name, messages, scenario, tokenizer)
        if isinstance(rendered, str):
            assert re.search("writes nothing for message|mixes message", rendered), (name, rendered)
            continue
        stopless = {note.turn for note in rendered.notes if note.status == NO_STOP_TOKEN}
        noted = {note.turn for note in rendered.notes}
        replies = [message["content"].strip() for message in messages if message["role"] == "assistant"]
        others = {message["content"].strip() for message in messages if message["role"] != "assistant"} - {
            *replies,
            "x",
            "S",
        }
        for turn, (reply, (start, end)) in enumerate(zip(replies, rendered.supervised, strict=True)):
            learned = rendered.text[start:end]
            opened = rendered.text[start - len("<think>\n") : end]  # a generation prompt may write the first words
            assert turn in noted or reply in opened, (name, turn, learned)
            assert turn in stopless or learned.endswith(STOPS), (name, turn, learned)
            assert not any(other in learned for other in others if len(other) > 2), (name, turn, learned)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_hand_marked_twins_agree_up_to_the_definition(scenario, tokenizer):
    """A twin may mark more at the end (behind the stop token) or at the start (what the generation prompt writes)."""
    messages = SCENARIOS[scenario]
    for name in TWINS:
        text = plain(name, messages, scenario)
        twin = plain(f"{name}_training", messages, scenario, return_assistant_tokens_mask=True)
        if text is None or twin is None or twin[0] != text:
            continue
        rendered = ours_or_why_not(name, messages, scenario, tokenizer)
        if isinstance(rendered, str):
            continue  # accounted for by the test before
        if any(note.status in HARMFUL for note in rendered.notes) or (name, scenario) in TWIN_ERRS:
            continue
        mine, theirs = joined(rendered.supervised), joined(twin[1])
        assert len(mine) == len(theirs), name
        replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        given = [plain(name, messages[:index], scenario, add_generation_prompt=True) or "" for index in replies]
        for (start, end), (theirs_start, theirs_end) in zip(mine, theirs, strict=True):
            early, late, extra = text[theirs_start:start], text[end:theirs_end], text[theirs_end:end]
            assert start >= theirs_start, (name, text[start:theirs_start])
            assert any(early in prompt for prompt in given), (name, early)
            assert late.strip() in ("", *STOPS), (name, late)
            assert extra.strip() in ("", *STOPS), (name, extra)


def joined(spans):
    """Spans that touch become one."""
    found = []
    for start, end in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found
