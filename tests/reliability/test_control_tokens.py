"""Whatever a message spells, what is learned and where turns end is what an innocent word in its place would give."""

import re

import pytest

from lora_sft.chat.control import special_tokens_of
from lora_sft.chat.labels import IGNORED, encode_rendered
from lora_sft.chat.rendering import render
from lora_sft.chat.stops import stop_tokens_of
from lora_sft.chat.templates import shipped_templates
from lora_sft.chat.turns import HARMFUL
from lora_sft.errors import LoraSftError
from lora_sft.model.tiny import tokenizer_for

WORD = "wrd"
TEMPLATES = {template.name: template for template in shipped_templates()}


def talk(where, spelled):
    """A conversation in which one speaker says something odd."""
    said = {name: f"a {spelled} b" if name == where else f"{name} says" for name in ("user", "assistant", "tool")}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": said["user"]}}}
    with_tool = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": said["tool"], "name": "f"},
    ]
    return [
        {"role": "user", "content": said["user"]},
        *(with_tool if where == "tool" else []),
        {"role": "assistant", "content": said["assistant"]},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": "the end"},
    ]


def seen(messages, tokenizer):
    """(learned text, control tokens as ids in order, those of them that are learned); None if it is refused."""
    stops = stop_tokens_of(tokenizer)
    try:
        rendered = render(messages, tokenizer, stop_tokens=stops)
        example = encode_rendered(rendered, tokenizer)
    except LoraSftError:
        return None
    if any(note.status in HARMFUL for note in rendered.notes):
        return None
    control = set(tokenizer.convert_tokens_to_ids(special_tokens_of(tokenizer)))
    learned = [label for label in example.labels if label != IGNORED]
    return (
        tokenizer.decode(learned),
        [token for token in example.input_ids if token in control],
        [token for token in learned if token in control],
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("where", ["user", "tool", "assistant"])
def test_a_spelled_control_token_stays_text_or_is_refused(name, where):
    tokenizer = tokenizer_for(TEMPLATES[name])
    innocent = seen(talk(where, WORD), tokenizer)
    if innocent is None:
        pytest.skip("this template has no tools")
    stops = set(stop_tokens_of(tokenizer))
    kept = 0
    for token in special_tokens_of(tokenizer):
        found = seen(talk(where, token), tokenizer)
        if found is None:
            continue
        kept += 1
        learned, control, learned_control = found
        assert learned == innocent[0].replace(WORD, token), token
        if where != "assistant":
            assert (control, learned_control) == innocent[1:], token
        else:  # a reply may hold tokens of its own, such as <think>, but none that ends a turn
            ends = tokenizer.convert_tokens_to_ids(sorted(stops))
            for part, wanted in ((control, innocent[1]), (learned_control, innocent[2])):
                assert [one for one in part if one in ends] == [one for one in wanted if one in ends], token
    assert kept or where == "tool"


def test_the_table_of_templates_is_tried_with_many_tokens():
    counts = [len(special_tokens_of(tokenizer_for(template))) for template in TEMPLATES.values()]
    assert len(counts) >= 27
    assert 3 * sum(counts) > 500
    assert re.match(r"^\w+$", WORD)
