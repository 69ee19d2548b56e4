"""`templates check`: every scenario, looked at from outside; and what it must be able to catch."""

from collections import Counter
from dataclasses import replace
from importlib.resources import files

import pytest

from lora_sft.api import check
from lora_sft.chat import check as checking
from lora_sft.chat.check import REFUSED, UNSUPPORTED, WRONG, check_template
from lora_sft.chat.probe import guess_stop_token
from lora_sft.chat.scenarios import scenarios
from lora_sft.errors import UsageError

FOLDER = files("trl") / "chat_templates"
TEMPLATES = sorted(file.name for file in FOLDER.iterdir() if file.name.endswith(".jinja"))


def test_there_are_twenty_scenarios_or_more():
    names = [scenario.name for scenario in scenarios()]
    assert len(names) == len(set(names)) >= 20


def test_no_word_of_anybody_else_is_learned_under_any_real_template():
    """And every word of a reply is learned, or reported."""
    assert len(TEMPLATES) >= 41
    for name in TEMPLATES:
        found = check(str(FOLDER / name))
        statuses = Counter(finding.status for finding in found)
        assert WRONG not in statuses, (name, [finding for finding in found if finding.status == WRONG])
        refused = {finding.scenario for finding in found if finding.status == REFUSED}
        assert refused <= {"a tool call with words"}, (name, refused)
        assert statuses[UNSUPPORTED] < len(found), name


def test_a_word_of_somebody_else_is_caught(tokenizer, monkeypatch):
    honest = checking.render
    monkeypatch.setattr(
        checking, "render", lambda *given, **more: replace(honest(*given, **more), supervised=[(0, 40)])
    )
    found = {finding.scenario: finding for finding in check_template(tokenizer)}
    assert found["one turn"].status == WRONG
    assert "asked-one of another message is learned" in found["one turn"].words
    assert "said-one of a reply is not learned" in found["one turn"].words


def test_another_text_is_caught(tokenizer, monkeypatch):
    honest = checking.render
    monkeypatch.setattr(checking, "render", lambda *given, **more: replace(honest(*given, **more), text="x" * 999))
    assert {finding.status for finding in check_template(tokenizer)} <= {WRONG, REFUSED}
    assert "the text is not that of apply_chat_template" in check_template(tokenizer)[0].words


def test_what_is_neither_a_template_nor_a_model_is_an_error():
    with pytest.raises(UsageError):
        check("nowhere/nothing")


def test_the_stop_token_is_guessed_from_the_last_reply(tokenizer):
    tokenizer.eos_token = "<|endoftext|>"
    assert guess_stop_token(tokenizer, ["<|endoftext|>"]) == "<|im_end|>"
    assert guess_stop_token(tokenizer, ["<|im_end|>"]) is None
    tokenizer.chat_template = "{{ messages | length }}"
    assert guess_stop_token(tokenizer, ["<|im_end|>"]) is None
