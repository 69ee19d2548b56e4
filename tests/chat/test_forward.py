"""Prompts that are put together instead of rendered: which templates allow it, and that both are the same."""

from importlib.resources import files

import pytest
from jinja2 import Environment

from lora_sft.chat.forward import Forward, reads_forward
from lora_sft.chat.prompts import Prompts
from lora_sft.chat.rendering import with_aliases
from lora_sft.chat.scenarios import scenarios
from lora_sft.chat.traced import runs_of
from lora_sft.chat.tracing import FAILURES, compile_traced
from lora_sft.chat.turns import extents_of

FOLDER = files("trl") / "chat_templates"
LOOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize(
    ("template", "first"),
    [
        (LOOP + PROMPT, 1),
        ("{% set rest = messages[1:] %}{{ messages[0].content }}" + LOOP.replace("messages", "rest") + PROMPT, 2),
        (LOOP.replace("{{ m.role }}", "{{ loop.index0 }}{{ 'x' if loop.first }}") + PROMPT, 1),
        ("{% macro say(x) %}{{ x }}{% endmacro %}" + LOOP.replace("m.content", "say(m.content)") + PROMPT, 1),
        (LOOP.replace("\n", "{% for t in [1] %}{{ loop.last }}{% endfor %}") + PROMPT, 1),
        (LOOP.replace("m.role", "loop.last") + PROMPT, None),
        (LOOP.replace("m.role", "loop") + PROMPT, None),
        (LOOP.replace("m.role", "messages | length") + PROMPT, None),
        (LOOP.replace("m.role", "messages[-1].role") + PROMPT, None),
        (LOOP.replace("m.role", "messages[loop.index].role") + PROMPT, None),
        (LOOP.replace("m.role", "add_generation_prompt") + PROMPT, None),
        (LOOP + LOOP + PROMPT, None),
        (LOOP + PROMPT.replace("assistant", "{{ messages[0].role }}"), None),
        ("{% set ns = namespace(n=0) %}" + LOOP + PROMPT.replace("assistant", "{{ ns.n }}"), None),
        ("{% set rest = messages[::-1] %}" + LOOP.replace("messages", "rest") + PROMPT, None),
        ("{% if messages %}" + LOOP + "{% endif %}" + PROMPT, None),
        (PROMPT, None),
    ],
)
def test_a_template_that_reads_forward_is_known_by_its_syntax(template, first):
    found = reads_forward(Environment().parse(template))
    assert found == (None if first is None else Forward(first, ("add_generation_prompt",)))


def test_prompts_put_together_are_those_that_are_rendered():
    variables = {"bos_token": "<s>", "eos_token": "</s>", "documents": None, "add_generation_prompt": False}
    compared = set()
    for name in sorted(file.name for file in FOLDER.iterdir() if file.name.endswith(".jinja")):
        compiled = compile_traced((FOLDER / name).read_text(encoding="utf-8"))
        for scenario in scenarios():
            messages, given = with_aliases(scenario.messages), {**variables, "tools": scenario.tools}
            try:
                text = compiled.render(messages, given)
            except FAILURES:
                continue
            prompts = Prompts(compiled, messages, given, str.__str__(text), extents_of(runs_of(text)))
            for index in filter(prompts.reads_forward, range(len(messages))):
                told = compiled.plain_text(messages[:index], given | {"add_generation_prompt": True})
                assert prompts.given(index) == told, (name, scenario.name)
                assert prompts.before(index) == compiled.plain_text(messages[:index], given), (name, scenario.name)
                compared.add(name)
    assert {"llama3.jinja", "gptoss.jinja"} - compared == {"gptoss.jinja"}
    assert len(compared) >= 20
