"""A chat template → how it fares with every scenario, looked at from outside.

The words of a scenario tell who says them, so whether the right text is learned can be seen without the tracing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_sft.chat.rendering import Rendered, prompt_text, render
from lora_sft.chat.scenarios import Scenario, scenarios
from lora_sft.chat.turns import DROPPED, REWRITTEN, STATUSES
from lora_sft.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXACT = "exact"
REFUSED = "refused"
UNSUPPORTED = "template refuses"
WRONG = "wrong"

SAID = re.compile(r"(?:said|thought)-\w+")
HEARD = re.compile(r"(?:asked|told)-\w+")


@dataclass(frozen=True)
class Finding:
    """How a template fares with one scenario.

    Attributes:
        scenario: its name.
        status: `exact`; the gravest status of its notes; `template refuses` what it has no place for; `refused` by us;
            or `wrong`, which must never be.
        words: what a person should know.
        learned: what the model must produce.
    """

    scenario: str
    status: str
    words: list[str] = field(default_factory=list)
    learned: list[str] = field(default_factory=list)


def check_template(
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None = None,
    stop_tokens: Sequence[str] | None = None,
    **variables: Any,
) -> list[Finding]:
    """Every scenario, rendered and looked at; the arguments are those of `render`."""
    control_tokens = tuple(str(token) for token in tokenizer.all_special_tokens)
    return [_try(scenario, tokenizer, chat_template, stop_tokens, variables) for scenario in scenarios(control_tokens)]


def _try(
    scenario: Scenario,
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None,
    stop_tokens: Sequence[str] | None,
    variables: dict[str, Any],
) -> Finding:
    template = chat_template or str(tokenizer.chat_template)
    try:  # within its limits first: transformers sets none
        prompt_text(scenario.messages, tokenizer, scenario.tools, template, add_generation_prompt=False, **variables)
    except TemplateError as error:
        return Finding(scenario.name, UNSUPPORTED, [str(error)])
    try:
        text = tokenizer.apply_chat_template(
            scenario.messages, tools=scenario.tools, chat_template=template, tokenize=False, **variables
        )
    except Exception as error:  # whatever a template raises, it has no place for this conversation
        return Finding(scenario.name, UNSUPPORTED, [str(error)])
    try:
        rendered = render(scenario.messages, tokenizer, scenario.tools, template, stop_tokens, **variables)
    except TemplateError as error:
        return Finding(scenario.name, REFUSED, [str(error)])
    learned = [rendered.text[start:end] for start, end in rendered.supervised]
    if mistakes := _mistakes(scenario, rendered, str(text)):
        return Finding(scenario.name, WRONG, mistakes, learned)
    statuses = [note.status for note in rendered.notes]
    gravest = max(statuses, key=STATUSES.index, default=EXACT)
    notes = sorted(rendered.notes, key=lambda note: -STATUSES.index(note.status))
    return Finding(scenario.name, gravest, [f"reply {note.turn + 1}: {note.words}" for note in notes], learned)


def _mistakes(scenario: Scenario, rendered: Rendered, text: str) -> list[str]:
    """What must never be, seen from outside."""
    learned = "".join(rendered.text[start:end] for start, end in rendered.supervised)
    mistakes = [] if rendered.text == text else ["the text is not that of apply_chat_template"]
    mistakes += [f"{word} of another message is learned" for word in HEARD.findall(learned)]
    if not any(note.status in (DROPPED, REWRITTEN) for note in rendered.notes):
        said = [word for message in scenario.messages if message["role"] == "assistant" for word in _words(message)]
        mistakes += [f"{word} of a reply is not learned" for word in said if word not in learned]
    return mistakes


def _words(message: dict[str, Any]) -> list[str]:
    return SAID.findall(str([value for key, value in message.items() if key != "role"]))
