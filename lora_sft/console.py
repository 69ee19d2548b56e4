"""The one door for words meant for people: a rich console on standard error.

Standard output is left to results (replies, tables, JSON). Without a terminal, rich writes plain lines.
"""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> "Console":
    """The console on standard error. Made at first use, because importing rich takes its time."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(topic: str, words: str) -> None:
    """One line about a choice or a fact: `precision: bfloat16 (this GPU supports it)`."""
    from rich.text import Text

    console().print(Text.assemble((topic, "bold cyan"), ": ", words), soft_wrap=True)


def warn(words: str) -> None:
    """One line about something that a person should look at, though the run goes on."""
    from rich.text import Text

    console().print(Text.assemble(("warning", "bold yellow"), ": ", words), soft_wrap=True)
