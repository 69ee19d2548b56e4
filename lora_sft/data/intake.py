"""Rows → conversations that can be trained on, with every row that cannot accounted for."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lora_sft.data.checks import check_conversation
from lora_sft.data.conversation import Conversation
from lora_sft.data.formats import Reading, to_conversation, unused_columns
from lora_sft.data.problems import Problem, RowError
from lora_sft.data.sources import Row
from lora_sft.errors import DataError

OnBadRow = Literal["error", "skip"]
SHOWN = 10
"""So many problems of a kind are told one by one."""


@dataclass
class Intake:
    """The account of what was read; filled while `conversations` is walked through.

    Attributes:
        rows: how many were read.
        usable: how many of them are conversations that can be trained on.
        problems: what is wrong with the others, and what should be known of these; the first KEPT.
        grave: how many rows cannot be trained on.
        layouts: {name of a layout: rows}.
        unused: {column that nothing was made of: rows that have it}.
        bad: the rows that cannot be trained on, as they stand; at most KEPT.
        duplicates: how many rows say the same as one before.
        names_repetitions: whether each of those is noted, which takes memory for every row.
    """

    KEPT = 10_000

    rows: int = 0
    usable: int = 0
    problems: list[Problem] = field(default_factory=list)
    grave: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[Problem, Any]] = field(default_factory=list)
    duplicates: int = 0
    names_repetitions: bool = False
    _digests: "array[int]" = field(default_factory=lambda: array("q"), repr=False, compare=False)
    _sources: list[str] = field(default_factory=list, repr=False, compare=False)

    def conversations(self, rows: Iterable[Row], reading: Reading | None = None) -> Iterator[Conversation]:
        """The conversations among the rows that can be trained on, in order."""
        for row in rows:
            self.rows += 1
            try:
                conversation = to_conversation(row, reading)
                found = check_conversation(conversation)
            except RowError as error:
                found = [error.problem]
            for problem in found:
                self._note(problem, row if problem.is_grave else None)
            if any(problem.is_grave for problem in found):
                self.grave += 1
                continue
            self.usable += 1
            self.layouts[conversation.layout] += 1
            self.unused.update(unused_columns(row.value, conversation.layout, reading))
            self._remember(conversation)
            yield conversation

    def _note(self, problem: Problem, row: Row | None) -> None:
        if len(self.problems) < self.KEPT:
            self.problems.append(problem)
            if row is not None:
                self.bad.append((problem, row.value))

    def _remember(self, conversation: Conversation) -> None:
        """Keeps what tells a conversation from others: 8 bytes, and its source if repetitions are to be named."""
        said = [conversation.messages, conversation.tools, conversation.text, conversation.input_ids]
        digest = hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=8).digest()
        self._digests.append(int.from_bytes(digest, "little", signed=True))
        if self.names_repetitions:
            self._sources.append(conversation.source)

    def count_repetitions(self) -> None:
        """Counts the rows that say the same as one before, and notes each if `names_repetitions`; at the end."""
        digests = np.array(self._digests)
        _, firsts, groups = np.unique(digests, return_index=True, return_inverse=True)
        self.duplicates = len(digests) - len(firsts)
        if self.names_repetitions:
            for place in np.flatnonzero(firsts[groups] != np.arange(len(digests))):
                words = f"says the same as {self._sources[firsts[groups[place]]]}"
                fix = "is it meant to weigh twice?"
                self._note(Problem(self._sources[place], "", words, fix, is_grave=False), None)

    def bad_rows(self) -> str:
        """The rows that cannot be trained on, a line of JSON each: where, what is wrong, the row as it stands."""
        lines = (
            {
                "source": problem.source,
                "field": problem.field,
                "problem": problem.problem,
                "fix": problem.fix,
                "row": row,
            }
            for problem, row in self.bad
        )
        # NaN and infinity are no JSON; they are written as text.
        plain = (json.loads(json.dumps(line, default=str), parse_constant=str) for line in lines)
        return "".join(json.dumps(line) + "\n" for line in plain)

    def refuse(self) -> None:
        """Raises if there were rows that cannot be trained on.

        Raises:
            DataError: the first of them, and how many there are.
        """
        grave = [f"- {problem}" for problem in self.problems if problem.is_grave]
        if grave:
            rest = [f"- … and {len(grave) - SHOWN:,} more"] if len(grave) > SHOWN else []
            head = f"{self.grave:,} of {self.rows:,} rows cannot be trained on:"
            advice = "on_bad_row: skip leaves them out, counts them and writes them to bad_rows.jsonl"
            raise DataError("\n".join([head, *grave[:SHOWN], *rest, advice]))
        if not self.rows:
            raise DataError("the dataset is empty: there is nothing to learn from")
