"""Random conversations under random templates, against an answer that is computed without tracing.

A template is drawn as a plan: how it walks the messages, how it writes a header, a message's words and their end. The
plan makes both the Jinja source and, in plain Python, the same text with the owner of every part.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora_sft.chat.rendering import render
from lora_sft.model.tiny import tiny_tokenizer

STOP = "<|im_end|>"
TOKENIZER = tiny_tokenizer(["nothing to learn from"], 300)
TOKENIZER.eos_token = STOP


def literal(text: str) -> str:
    """Text that Jinja writes as it is, white space and all."""
    return "{{ " + repr(text) + " }}"


class Part(NamedTuple):
    """What is written for a message: its header, its own words, what comes behind."""

    header: str
    words: str
    behind: str

    @property
    def text(self) -> str:
        return self.header + self.words + self.behind


@dataclass(frozen=True)
class Plan:
    """A template.

    Attributes:
        walk: how it goes through the messages.
        header: how a turn begins.
        words: what it does with a message's text.
        behind: what it writes behind it, the stop token first.
        forgets: whether thoughts (all up to a `|`) are left out of replies that are not last.
        opens: what the header of a reply, and the generation prompt, have at their end.
        epilogue: what it writes behind all messages.
    """

    walk: str
    header: str
    words: str
    behind: str
    forgets: bool
    opens: str
    epilogue: str

    # --- in Jinja ---

    def source(self) -> str:
        header = {
            "tag": literal("<|im_start|>") + "{{ m.role }}" + literal("\n"),
            "plain": "{{ m.role | capitalize }}" + literal(": "),
            "branches": "{% if m.role == 'user' %}Q>{% elif m['role'] == 'assistant' %}A>{% else %}S>{% endif %}",
            "lookup": "{{ {'user': '### In', 'assistant': '### Out', 'system': '### Sys'}[m.role] ~ '\\n' }}",
        }[self.header]
        words = {
            "as they are": "m.content",
            "trim": "m.content | trim",
            "strip": "m['content'].strip()",
            "split and join": "m.content.split(' ') | join(' ')",
            "slices": "m.content[:2] ~ m.content[2:]",
            "string": "('' ~ m.content) | string",
            "replace": "m.content.replace('x', 'yy')",
            "lines": "m.content.splitlines(true) | join",
            "partition": "m.content.partition(' ') | join",
        }[self.words]
        if self.forgets:
            last = "i == messages | length - 1" if self.walk == "index" else "loop.last"
            thoughtless = "(m.content.split('|') | last)"
            kept = words.replace("m.content", thoughtless).replace("m['content']", thoughtless)
            words = f"(({words}) if m.role != 'assistant' or {last} else ({kept}))"
        opens = f"{{% if m.role == 'assistant' %}}{literal(self.opens)}{{% endif %}}" if self.opens else ""
        behind = "".join("{{ eos_token }}" if part == STOP else literal(part) for part in self.behind_parts)
        body = f"{header}{opens}{{{{ {words} }}}}{behind}"
        walk = {
            "for": f"{{% for m in messages %}}{body}{{% endfor %}}",
            "set": f"{{% for one in messages %}}{{% set m = one %}}{body}{{% endfor %}}",
            "index": f"{{% for i in range(messages | length) %}}{{% set m = messages[i] %}}{body}{{% endfor %}}",
            "macro": f"{{% macro say(m, loop) %}}{body}{{% endmacro %}}"
            "{% for one in messages %}{{ say(one, loop) }}{% endfor %}",
            "namespace": "{% set ns = namespace(all='') %}{% for m in messages %}"
            f"{{% set part %}}{body}{{% endset %}}{{% set ns.all = ns.all ~ part %}}{{% endfor %}}{{{{ ns.all }}}}",
            "plus": "{% set ns = namespace(all='') %}{% for m in messages %}"
            f"{{% set part %}}{body}{{% endset %}}{{% set ns.all = ns.all + part %}}{{% endfor %}}{{{{ ns.all }}}}",
            "first apart": "{% set first = messages[0] %}{% for m in [first] %}"
            + body.replace("loop.last", "messages | length == 1")
            + f"{{% endfor %}}{{% for m in messages[1:] %}}{body}{{% endfor %}}",
            "look ahead": "{% for m in messages %}{% if loop.nextitem is defined %}{% set next = loop.nextitem %}"
            f"{{% endif %}}{body}{{% endfor %}}",
            "filtered": f"{{% for m in messages if m.role %}}{body}{{% endfor %}}",
        }[self.walk]
        prompt = f"{{% if add_generation_prompt %}}{literal(self.prompt)}{{% endif %}}"
        return walk + (literal(self.epilogue) if self.epilogue else "") + prompt

    @property
    def behind_parts(self) -> list[str]:
        """Stop tokens and the text between them."""
        return [part for part in re.split(f"({re.escape(STOP)})", self.behind) if part]

    # --- in Python ---

    def head(self, role: str) -> str:
        return {
            "tag": f"<|im_start|>{role}\n",
            "plain": f"{role.capitalize()}: ",
            "branches": {"user": "Q>", "assistant": "A>", "system": "S>"}[role],
            "lookup": {"user": "### In\n", "assistant": "### Out\n", "system": "### Sys\n"}[role],
        }[self.header]

    @property
    def prompt(self) -> str:
        return self.head("assistant") + self.opens

    def parts(self, messages) -> list[Part]:
        found = []
        for place, message in enumerate(messages):
            text, is_reply = message["content"], message["role"] == "assistant"
            if self.forgets and is_reply and place < len(messages) - 1:
                text = text.split("|")[-1]
            if self.words in ("trim", "strip"):
                text = text.strip()
            if self.words == "replace":
                text = text.replace("x", "yy")
            header = self.head(message["role"]) + (self.opens if is_reply else "")
            found.append(Part(header, text, self.behind))
        return found

    def text(self, messages, with_prompt: bool = False) -> str:
        return (
            "".join(part.text for part in self.parts(messages)) + self.epilogue + (self.prompt if with_prompt else "")
        )

    def answer(self, messages) -> list[tuple[int, int]]:
        """What the model must produce, from the definition."""
        text, parts, spans, position = self.text(messages), self.parts(messages), [], 0
        for place, part in enumerate(parts):
            if messages[place]["role"] == "assistant":
                given = self.text(messages[:place], with_prompt=True)
                # The history may differ; the header is the generation prompt, so the reply begins behind it.
                start = len(given) if text.startswith(given) else position + len(part.header)
                words_end = max(start, position + len(part.header) + len(part.words))
                spans.append((start, text.index(STOP, words_end) + len(STOP)))
            position += len(part.text)
        return spans


plans = st.builds(
    Plan,
    walk=st.sampled_from(
        ["for", "set", "index", "macro", "namespace", "plus", "first apart", "look ahead", "filtered"]
    ),
    header=st.sampled_from(["tag", "plain", "branches", "lookup"]),
    words=st.sampled_from(
        ["as they are", "trim", "strip", "split and join", "slices", "string", "replace", "lines", "partition"]
    ),
    behind=st.sampled_from([STOP, f"{STOP}\n", f"\n{STOP}\n", f"{STOP}{STOP}"]),
    forgets=st.booleans(),
    opens=st.sampled_from(["", "<think>\n", "\n"]),
    epilogue=st.sampled_from(["", "\n", "The end."]),
)

words = st.lists(
    st.sampled_from(
        [
            "a",
            "x",
            " ",
            "  ",
            "\n",
            "|",
            "🙂",
            "é",
            "Q>",
            "A>",
            "assistant",
            STOP,
            "<|im_start|>",
            "<think>\n",
            "User: ",
        ]
    ),
    max_size=6,
).map("".join)


@st.composite
def conversations(draw):
    first = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=6))
    return first + [{"role": role, "content": draw(words)} for role in roles]


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans, conversations())
@example(
    Plan("for", "tag", "trim", STOP, True, "<think>\n", ""),
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a|b"}, {"role": "assistant", "content": " "}],
)
def test_what_is_learned_is_what_the_definition_says(plan, messages):
    source = plan.source()
    rendered = render(messages, TOKENIZER, chat_template=source, stop_tokens=[STOP])
    assert rendered.text == plan.text(messages)
    expected = plan.answer(messages)
    assert rendered.supervised == expected, source


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans, conversations())
def test_no_word_of_anybody_else_is_ever_learned(plan, messages):
    """Under each message another letter, so that a foreign one shows."""
    told = [message | {"content": chr(ord("①") + place) * 3} for place, message in enumerate(messages)]
    rendered = render(told, TOKENIZER, chat_template=plan.source(), stop_tokens=[STOP])
    learned = "".join(rendered.text[start:end] for start, end in rendered.supervised)
    replies = {message["content"][0] for message in told if message["role"] == "assistant"}
    assert {letter for letter in learned if "①" <= letter <= "⑳"} == replies
