"""What can be wrong with a row: where, what, and what to do about it."""

from dataclasses import dataclass

from lora_sft.errors import DataError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a row.

    Attributes:
        source: `chats.jsonl:12`.
        field: `messages[3].role`; empty for the row as a whole.
        problem: `"bot" is not a role`.
        fix: what is accepted, and what to do next.
        is_grave: whether the row cannot be trained on as it is; else it is only told.
    """

    source: str
    field: str
    problem: str
    fix: str = ""
    is_grave: bool = True

    def __str__(self) -> str:
        where = f"{self.source}: {self.field}" if self.field else self.source
        return f"{where}: {self.problem}" + (f"; {self.fix}" if self.fix else "")


class RowError(DataError):
    """A row that is no conversation; `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem

    def __reduce__(self) -> tuple[type["RowError"], tuple[Problem]]:
        return RowError, (self.problem,)
