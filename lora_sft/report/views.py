"""Values of the journey → tables and highlighted text: rich on a terminal, plain lines elsewhere."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lora_sft.chat.rendering import Rendered
from lora_sft.console import console
from lora_sft.training.job import Job

SUPERVISED = "bold green"


def conversation_view(rendered: Rendered, title: str, supervised_tokens: int, tokens: int) -> RenderableType:
    """A rendered conversation; what is learned of it stands in «» and in colour."""
    text = Text()
    position = 0
    for start, end in rendered.supervised:
        text.append(rendered.text[position:start], "dim").append("«").append(
            rendered.text[start:end], SUPERVISED
        ).append("»")
        position = end
    text.append(rendered.text[position:].rstrip("\n"), "dim")
    counts = f"«learned»: {supervised_tokens:,} of {tokens:,} tokens"
    if not console().is_terminal:
        return Group(Text(title), text, Text(counts))
    return Panel(text, title=title, subtitle=counts, title_align="left", subtitle_align="left")


def data_view(job: Job) -> RenderableType:
    """The first example and the counts of the data."""
    table = table_of("data", "examples", "tokens", "learned", "dropped: too long", "dropped: no reply", "cut")
    for name, prepared in (("train", job.train), ("evaluation", job.evaluation)):
        if prepared is not None:
            counts = (
                len(prepared.examples),
                prepared.tokens,
                prepared.supervised_tokens,
                len(prepared.too_long),
                len(prepared.without_reply),
                prepared.cut,
            )
            table.add_row(name, *(f"{count:,}" for count in counts))
    first = job.train.examples[0]
    shown = conversation_view(
        job.train.first, f"first conversation: {first.source}", first.supervised_tokens, len(first.input_ids)
    )
    return Group(shown, table)


def table_of(*columns: str, **options: Any) -> Table:
    """An empty table; without a terminal it has no lines."""
    plain = not console().is_terminal
    return Table(*columns, box=None if plain else box.ROUNDED, pad_edge=not plain, title_justify="left", **options)


def replies_view(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts, side by side."""
    table = table_of(*columns, title=title, show_lines=console().is_terminal)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def measures_view(found: dict[str, Any]) -> RenderableType:
    """What `evaluate` returns, an adapter beside its base."""
    columns = ("adapter", "base") if "base_loss" in found else ("model",)
    table = table_of("", *columns)
    for name, form in (("loss", "{:.4f}"), ("perplexity", "{:,.2f}"), ("token_accuracy", "{:.1%}")):
        values = (found[name], found.get(f"base_{name}"))
        table.add_row(name.replace("_", " "), *(form.format(value) for value in values if value is not None))
    seen = f"{found['examples']:,} conversations, {found['supervised_tokens']:,} tokens of replies"
    return Group(table, Text(f"{seen}; {found['too_long']:,} left out as too long"))
