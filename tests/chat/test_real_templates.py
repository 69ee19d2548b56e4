"""Real chat templates: TRL ships many, most with a twin whose reply is marked by hand. An independent answer key."""

import re
from collections import Counter
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lora_sft.chat.rendering import render, with_aliases
from lora_sft.chat.scenarios import scenarios
from lora_sft.chat.tracing import FAILURES, compile_traced
from lora_sft.chat.turns import HARMFUL
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
SCENARIOS = {scenario.name: scenario for scenario in scenarios(("<|im_end|>", "<|im_start|>", "</s>"))}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
DOCUMENT = Path(__file__).parents[2] / "docs" / "masking.md"

# Where the hand-made key itself is wrong: it marks the header of a second reply in a row as said by the assistant.
TWIN_ERRS = {(name, "two replies in a row") for name in ("deepseek_r1_distill", "deepseekv3", "gptoss")}


def source(name):
    return TEMPLATES[name].read_text(encoding="utf-8")


def plain(name, scenario, **more):
    """(text, marks) as transformers renders it; None if the template refuses the conversation."""
    try:
        texts, marks = render_jinja_template(
            [more.pop("messages", scenario.messages)],
            chat_template=source(name),
            tools=scenario.tools,
            **SPECIAL,
            **more,
        )
    except FAILURES:
        return None
    return texts[0], marks[0] if more.get("return_assistant_tokens_mask") else []


def ours_or_why_not(name, scenario, tokenizer):
    try:
        return render(scenario.messages, tokenizer, scenario.tools, source(name), STOPS, **SPECIAL)
    except TemplateError as error:
        return str(error)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda scenario: scenario.name)
def test_the_traced_text_is_that_of_transformers(scenario):
    for name in TEMPLATES:
        expected = plain(name, scenario)
        if expected is not None:
            more = SPECIAL | {"tools": scenario.tools, "documents": None, "add_generation_prompt": False}
            assert compile_traced(source(name)).render(with_aliases(scenario.messages), more) == expected[0], name


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda scenario: scenario.name)
def test_a_reply_begins_behind_its_prompt_and_ends_with_its_stop_token(scenario, tokenizer):
    replies = [index for index, message in enumerate(scenario.messages) if message["role"] == "assistant"]
    for name in ORIGINALS:
        rendered = ours_or_why_not(name, scenario, tokenizer) if plain(name, scenario) else ""
        if isinstance(rendered, str):
            assert re.search("^$|mixes message", rendered), (name, rendered)
            continue
        stopless = {note.turn for note in rendered.notes if note.status in HARMFUL}
        for turn, (start, end) in enumerate(rendered.supervised):
            given = plain(name, scenario, messages=scenario.messages[: replies[turn]], add_generation_prompt=True)
            if given is not None and rendered.text.startswith(given[0]):
                assert start == len(given[0]), (name, turn)
            assert turn in stopless or rendered.text[start:end].endswith(STOPS), (name, turn)


def causes(name, scenario, tokenizer):
    """Why our spans differ from the twin's, each cause once; or why they cannot be compared."""
    original, twin = plain(name, scenario), plain(f"{name}_training", scenario, return_assistant_tokens_mask=True)
    if original is None:
        return {"the template refuses the conversation"}
    text = original[0]
    if twin is None or twin[0] != text:
        return {"the twin renders another text"}
    rendered = ours_or_why_not(name, scenario, tokenizer)
    if isinstance(rendered, str):
        return {"refused by us, with the reason"}
    if any(note.status in HARMFUL for note in rendered.notes):
        return {"reported: the template drops something or never stops"}
    mine, theirs = joined(rendered.supervised), joined(twin[1])
    if (name, scenario.name) in TWIN_ERRS:
        return {"the twin marks the header of a second reply in a row"}
    found = set()
    replies = [index for index, message in enumerate(scenario.messages) if message["role"] == "assistant"]
    for index, (start, end), (first, last) in zip(replies, mine, theirs, strict=True):
        given = plain(name, scenario, messages=scenario.messages[:index], add_generation_prompt=True)
        early, late = text[first:start], text[end:last]
        assert first <= start, (name, scenario.name, "we mark more at the start", text[start:first])
        assert last >= end, (name, scenario.name, "we mark more at the end", text[last:end])
        if early:
            assert given is None or early in given[0], (name, scenario.name, early)
            found.add("the twin marks what the generation prompt has written already")
        if late:
            assert late.strip() in ("", *STOPS), (name, scenario.name, late)
            kind = "a second stop token" if late.strip() else "white space"
            found.add(f"the twin marks {kind} behind the stop token")
    return found or {"equal"}


def test_every_difference_to_the_hand_marked_twins_has_a_cause_that_is_documented(tokenizer):
    counts = Counter(
        cause for name in TWINS for scenario in SCENARIOS.values() for cause in causes(name, scenario, tokenizer)
    )
    document = DOCUMENT.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| *([\d,]+) \|$", document, re.MULTILINE)
    documented = {cause: int(count.replace(",", "")) for cause, count in rows}
    assert set(counts) <= set(documented)
    if f"TRL {version('trl')}" in document:
        assert counts == documented


def joined(spans):
    """Spans that touch become one."""
    found = []
    for start, end in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found
