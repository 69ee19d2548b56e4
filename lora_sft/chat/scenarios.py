"""Conversations that try a chat template: the shapes that real data has, with words that occur nowhere else."""

from dataclasses import dataclass
from typing import Any

from lora_sft.data.conversation import Message

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "read_tide",
            "description": "Height of the tide at a place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "A harbour."},
                    "hour": {"type": "integer", "description": "Hour of the day."},
                },
                "required": ["place"],
            },
        },
    }
]


@dataclass(frozen=True)
class Scenario:
    """A conversation to try a template with.

    Attributes:
        name: in a few words.
        messages: whose words say who speaks, so that they can be told apart in the text.
        tools: that are offered, or None.
    """

    name: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def system(text: str) -> Message:
    """A system prompt."""
    return {"role": "system", "content": text}


def user(content: Any) -> Message:
    """A question."""
    return {"role": "user", "content": content}


def reply(content: Any, **more: Any) -> Message:
    """A reply; `more` is its reasoning or its calls."""
    return {"role": "assistant", "content": content, **more}


def call(place: str, hour: int = 9) -> dict[str, Any]:
    """A call of the one tool."""
    return {"id": "call00001", "type": "function", "function": {"name": "read_tide", "arguments": _where(place, hour)}}


def _where(place: str, hour: int) -> dict[str, Any]:
    return {"place": place, "hour": hour}


def result(text: str) -> Message:
    """What the tool answered."""
    return {"role": "tool", "name": "read_tide", "tool_call_id": "call00001", "content": text}


def scenarios(control_tokens: tuple[str, ...] = ()) -> list[Scenario]:
    """All of them.

    Args:
        control_tokens: of the template, for the conversations that quote them.
    """
    quoted = " ".join(control_tokens[:4]) or "<|im_end|>"
    asked = [user("asked-one?"), reply("said-one.")]
    return [
        Scenario("one turn", asked),
        Scenario("system prompt", [system("told-one."), *asked]),
        Scenario(
            "three turns", [*asked, user("asked-two?"), reply("said-two."), user("asked-six?"), reply("said-six.")]
        ),
        Scenario("ends with the user", [*asked, user("asked-two?")]),
        Scenario("starts with the assistant", [reply("said-nine."), *asked]),
        Scenario("two replies in a row", [*asked, reply("said-two.")]),
        Scenario("two questions in a row", [user("asked-nine?"), *asked]),
        Scenario("empty reply", [user("asked-one?"), reply(""), user("asked-two?"), reply("said-two.")]),
        Scenario(
            "white space", [user(" asked-one?\n"), reply("  said-one. \n"), user("asked-two?"), reply("\n\nsaid-two.")]
        ),
        Scenario("emoji and scripts", [user("asked-one 🙂?"), reply("said-one 日本 🙃 שלום")]),
        Scenario(
            "the reply repeats the question", [user("the same"), reply("the same"), user("the same"), reply("the same")]
        ),
        Scenario("code", [user("asked-one?"), reply("said-one:\n```python\nif x:\n\treturn {'a': [1]}\n```\n")]),
        Scenario("the user quotes control tokens", [user(f"asked-one {quoted} asked-two"), reply("said-one.")]),
        Scenario("the reply quotes control tokens", [user("asked-one?"), reply(f"said-one {quoted} said-two.")]),
        Scenario(
            "typed parts",
            [user([{"type": "text", "text": "asked-one?"}]), reply([{"type": "text", "text": "said-one."}])],
        ),
        Scenario("thinking", [user("asked-one?"), reply("said-one.", reasoning_content="thought-one")]),
        Scenario(
            "thinking on two turns",
            [
                user("asked-one?"),
                reply("said-one.", reasoning_content="thought-one"),
                user("asked-two?"),
                reply("said-two.", reasoning_content="thought-two"),
            ],
        ),
        Scenario(
            "thinking inside the content",
            [
                user("asked-one?"),
                reply("<think>\nthought-one\n</think>\n\nsaid-one."),
                user("asked-two?"),
                reply("said-two."),
            ],
        ),
        Scenario("tools, none called", asked, TOOLS),
        Scenario(
            "a tool call",
            [user("asked-one?"), reply("", tool_calls=[call("said-port")]), result("told-high"), reply("said-one.")],
            TOOLS,
        ),
        Scenario(
            "a tool call with words",
            [
                user("asked-one?"),
                reply("said-so.", tool_calls=[call("said-port")]),
                result("told-high"),
                reply("said-one."),
            ],
            TOOLS,
        ),
        Scenario(
            "two tool calls at once",
            [
                user("asked-one?"),
                reply("", tool_calls=[call("said-port"), call("said-bay", 12)]),
                result("told-high"),
                result("told-low"),
                reply("said-one."),
                user("asked-two?"),
                reply("said-two."),
            ],
            TOOLS,
        ),
        Scenario(
            "thinking before a tool call",
            [
                system("told-one."),
                user("asked-one?"),
                reply("", reasoning_content="thought-one", tool_calls=[call("said-port")]),
                result("told-high"),
                reply("said-one.", reasoning_content="thought-two"),
            ],
            TOOLS,
        ),
        Scenario("ends with a tool call", [user("asked-one?"), reply("", tool_calls=[call("said-port")])], TOOLS),
    ]
