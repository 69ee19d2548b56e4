"""A chat template and the Go template that was derived from it → 200 random conversations on which they are equal."""

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_sft.data.conversation import Message
from lora_sft.exporting.go.asking import Render, Thought
from lora_sft.exporting.go.frame import ROLES, Reach, Underivable
from lora_sft.exporting.go.language import GoTemplateError, execute

CONVERSATIONS = 200
TRIES = 50
"""How many random conversations are offered for each one that is wanted."""

_WORDS = (
    *("Hello", "the", "tide", "is", "high.", "What", "of", "3 < 4 & 5 > 2?", "No!", "Yes: 100 %", "<b>it</b>"),
    *("naïve", "日本語", "שלום", "🙂", "é", "a\u200bb", "\u00a0", "\u3000", "{{ .Content }}", "{% raw %}", "{#", "}}"),
    *('"quoted"', '"""', "it's", "`code`", "\\n", "C:\\temp", "$x", "{", "}", '{"a": [1, {"b": null}]}', "-", "---"),
    *("```python\nif x:\n\treturn {'a': 1}\n```", "1. one\n2. two", "\n\n", "\n", "\t", "  ", "</s>", "<|im_end|>"),
)
_ENDS = ("", "", "", "", " ", "\n", "\n\n", "  \n", "\t", "\u00a0", "\r\n")


@dataclass(frozen=True)
class Difference:
    """The first conversation on which the two differ.

    Attributes:
        expected: what transformers renders.
        found: what the Go template writes, or why it fails.
    """

    messages: list[Message]
    expected: str
    found: str

    def __str__(self) -> str:
        same = next((i for i, (a, b) in enumerate(zip(self.expected, self.found, strict=False)) if a != b), None)
        place = min(len(self.expected), len(self.found)) if same is None else same
        first = max(place - 30, 0)
        roles = ", ".join(message["role"] for message in self.messages)
        said = _short(repr([message["content"] for message in self.messages]))
        return (
            f"after {roles} ({said}) the chat template writes …{self.expected[first : place + 40]!r}…, "
            f"the Go template …{self.found[first : place + 40]!r}…"
        )


def ollama_values(messages: Sequence[Message]) -> dict[str, Any]:
    """What Ollama gives a template for these messages: neighbours of one role become one message."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message["role"]:
            joined[-1]["Content"] += "\n\n" + message["content"]
        else:
            joined.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return {"Messages": joined, "System": system, "Tools": None, "Response": ""}


def prove(
    render: Render,
    template: str,
    reach: Reach,
    thoughts: Sequence[Thought] = (),
    without: str = "",
    count: int = CONVERSATIONS,
) -> Difference | None:
    """The first of `count` random conversations on which the two differ, or None.

    Args:
        thoughts: what a reply may hold before and behind a thought.
        without: text at the start that the Go template leaves out.

    Raises:
        Underivable: the chat template takes fewer conversations than that.
    """
    tried = 0
    for messages, expected in random_conversations(render, reach, thoughts, count):
        difference = compare(template, messages, expected.removeprefix(without))
        if difference is not None:
            return difference
        tried += 1
    if tried < count:
        raise Underivable(f"it takes only {tried} of {TRIES * count} random conversations, too few for a proof")
    return None


def compare(template: str, messages: list[Message], expected: str) -> Difference | None:
    """What the Go template writes otherwise than expected."""
    try:
        found = execute(template, ollama_values(messages))
    except (GoTemplateError, KeyError, IndexError, TypeError) as error:
        found = f"({type(error).__name__}: {error})"
    return None if found == expected else Difference(messages, expected, found)


def random_conversations(
    render: Render, reach: Reach, thoughts: Sequence[Thought], count: int
) -> Iterator[tuple[list[Message], str]]:
    """Conversations within reach that the chat template takes, and what it writes; the same ones every time."""
    draw = random.Random(0)
    found = 0
    for _ in range(TRIES * count):
        messages = [
            {"role": role, "content": _content(draw, reach, thoughts if role == "assistant" else ())}
            for role in _roles(draw, reach)
        ]
        text = render(messages, True)
        if text is not None:
            yield messages, text
            found += 1
            if found == count:
                return


def _roles(draw: random.Random, reach: Reach) -> list[str]:
    """Mostly user and assistant in turn, behind a system message or none."""
    while True:
        roles = ["system"] if draw.random() < 0.5 else []
        for _ in range(draw.choice((1, 1, 2, 3, 3, 4, 5, 7))):
            others = [role for role in ROLES if role not in roles[-1:]]
            usual = "assistant" if roles[-1:] == ["user"] else "user"
            roles.append(usual if draw.random() < 0.8 else draw.choice(others))
        if reach.holds(roles):
            return roles


def _content(draw: random.Random, reach: Reach, thoughts: Sequence[Thought]) -> str:
    if reach.empty_contents and draw.random() < 0.06:
        return draw.choice(("", "", " ", "\n \n"))
    text = _words(draw)
    if thoughts and draw.random() < 0.3:
        before, behind = draw.choice(list(thoughts))
        return before + _words(draw) + behind + text
    return draw.choice(_ENDS) + text + draw.choice(_ENDS)


def _words(draw: random.Random) -> str:
    words = draw.choices(_WORDS, k=draw.choice((1, 2, 3, 5, 8, 20)))
    words.append("".join(draw.choices(string.ascii_lowercase, k=4)))
    draw.shuffle(words)
    return "".join(word + draw.choice((" ", " ", " ", "", "\n")) for word in words).strip()


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "…"
