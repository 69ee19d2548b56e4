"""Rows → everything that a person should know of them before they are trained on."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lora_sft.chat.labels import encode_rendered
from lora_sft.chat.missing import words_of
from lora_sft.chat.turns import HARMFUL
from lora_sft.config import RunConfig
from lora_sft.data.conversation import Conversation
from lora_sft.data.intake import Intake
from lora_sft.data.problems import Problem
from lora_sft.errors import ModelError, TemplateError
from lora_sft.model.tokenizer import Speech
from lora_sft.preparation.prepare import HELP, render_conversation

PERCENTILES = (50, 90, 95, 99, 100)


@dataclass
class Report:
    """What `validate` found.

    Attributes:
        rows: how many were read.
        usable: how many can be trained on.
        problems: of rows that cannot, and what else should be known; the grave ones first.
        layouts: {name: rows}.
        roles: {role: messages}.
        messages: of each conversation, how many.
        lengths, supervised: tokens and supervised tokens of each example, if a model was named.
        tokens: {role: tokens of what it says}; `template` has the rest.
    """

    rows: int = 0
    usable: int = 0
    problems: list[Problem] = field(default_factory=list)
    layouts: dict[str, int] = field(default_factory=dict)
    roles: Counter[str] = field(default_factory=Counter)
    messages: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)
    too_long: int = 0
    duplicates: int = 0

    @property
    def grave(self) -> int:
        """How many problems keep a row from being trained on."""
        return sum(problem.is_grave for problem in self.problems)

    def percentiles(self) -> dict[str, dict[str, int]]:
        """{what is counted: {percentile: value}}, of the rows that can be trained on."""
        counted = {"messages": self.messages, "tokens": self.lengths, "supervised tokens": self.supervised}
        return {
            name: {str(p): int(np.percentile(values, p, method="higher")) for p in PERCENTILES}
            for name, values in counted.items()
            if values
        }

    def to_json(self) -> dict[str, Any]:
        """As `lora-sft validate --json` prints it."""
        total = sum(self.lengths)
        return {
            "rows": self.rows,
            "usable": self.usable,
            "problems": [{**asdict(problem), "grave": problem.is_grave} for problem in self.problems],
            "layouts": self.layouts,
            "duplicates": self.duplicates,
            "too_long": self.too_long,
            "messages": dict(self.roles),
            "tokens": {
                "total": total,
                "supervised": sum(self.supervised),
                "supervised_share": sum(self.supervised) / total if total else None,
                "by_role": dict(self.tokens),
            },
            "percentiles": self.percentiles(),
        }


def validate_conversations(
    conversations: Iterable[Conversation], intake: Intake, speech: Speech | None, config: RunConfig
) -> Report:
    """Walks through conversations and takes the account of their rows with it.

    Args:
        conversations: of `intake`, which they fill on the way.
        speech: None leaves tokens and the chat template out.
    """
    report = Report()
    more: list[Problem] = []
    for conversation in conversations:
        report.messages.append(len(conversation.messages))
        report.roles.update(message["role"] for message in conversation.messages)
        found = _look_at(conversation, speech, config, report) if speech else []
        is_dropped = config.truncation in ("drop", "error") and any("max_length" in p.problem for p in found)
        report.usable += not is_dropped and not any(problem.is_grave for problem in found)
        more += found
    report.rows, report.layouts, report.duplicates = intake.rows, dict(intake.layouts), intake.duplicates
    if not intake.rows:
        more.append(Problem("dataset", "", "is empty", "there is nothing to learn from"))
    report.problems = sorted([*intake.problems, *more], key=lambda problem: not problem.is_grave)
    return report


def _look_at(conversation: Conversation, speech: Speech, config: RunConfig, report: Report) -> list[Problem]:
    """What the template and `max_length` make of a conversation; its tokens are counted."""
    source, tokenizer = conversation.source, speech.tokenizer
    problems: dict[str, Problem] = {}
    if conversation.input_ids is not None and conversation.labels is not None:
        sizes = [(len(conversation.input_ids), sum(label >= 0 for label in conversation.labels[1:]))]
    else:
        try:
            texts = render_conversation(
                conversation, speech, config.chat_template_kwargs, config.turns, config.append_stop_token
            )
            examples = [encode_rendered(text, tokenizer) for text in texts]
        except (TemplateError, ModelError) as error:
            return [Problem(source, "", str(error).removeprefix(f"{source}: "))]
        sizes = [(len(example.input_ids), example.supervised_tokens) for example in examples]
        for note in (note for text in texts for note in text.notes):
            grave = note.status in HARMFUL and note.status.replace(" ", "_") not in config.allow
            fix = HELP.get(note.status, "") if grave else ""
            words = f"{note.status}: reply {note.turn + 1}: {note.words}"
            problems.setdefault(words, Problem(source, "", words, fix, is_grave=grave))
    for length, supervised in sizes:
        report.lengths.append(length)
        report.supervised.append(supervised)
        if length > config.max_length:
            report.too_long += 1
            words = f"has {length:,} tokens, more than max_length {config.max_length:,}"
            problems[words] = Problem(source, "", words, f"truncation is {config.truncation}", is_grave=False)
        elif supervised == 0:
            problems["none"] = Problem(
                source, "", "no token is learned", HELP["no reply"], "no_reply" not in config.allow
            )
    said: Counter[str] = Counter()
    for message in conversation.messages:
        words = words_of(message["content"]) + str(message.get("reasoning_content") or "")
        calls = message.get("tool_calls")
        words += json.dumps([call["function"] for call in calls], ensure_ascii=False) if calls else ""
        said[message["role"]] += len(tokenizer(words, add_special_tokens=False)["input_ids"]) if words else 0
    report.tokens.update(said)
    report.tokens["template"] += max(0, sizes[0][0] - said.total())
    return list(problems.values())
