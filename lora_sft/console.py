"""The doors for what people read: words about the work on standard error, results on standard output.

Without a terminal, lines are plain and long: no colours, no boxes, no wrapping at 80 columns.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


PLAIN_WIDTH = 200


def is_main_process() -> bool:
    """Whether this process speaks and writes; of several that a launcher started, the first one does."""
    import os

    return os.environ.get("RANK", "0") == "0"


@cache
def console(results: bool = False) -> "Console":
    """The console on standard error, or with `results` on standard output. Made at first use: importing rich takes "
    "its time."""
    import sys

    from rich.console import Console

    stream = sys.stdout if results else sys.stderr
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(stderr=not results, highlight=False, width=width, quiet=not is_main_process())


def table_of(*columns: str, **options: Any) -> "Table":
    """An empty table; without a terminal it has no lines."""
    from rich import box
    from rich.table import Table

    plain = not console().is_terminal
    return Table(*columns, box=None if plain else box.ROUNDED, pad_edge=not plain, title_justify="left", **options)


def say(topic: str, words: str) -> None:
    """One line about a choice or a fact: `precision: bfloat16 (this GPU supports it)`."""
    from rich.text import Text

    console().print(Text.assemble((topic, "bold cyan"), ": ", words), soft_wrap=True)


def warn(words: str) -> None:
    """One line about something that a person should look at, though the run goes on."""
    from rich.text import Text

    console().print(Text.assemble(("warning", "bold yellow"), ": ", words), soft_wrap=True)
