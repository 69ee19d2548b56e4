"""Values of the journey → tables and highlighted text for a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lora_sft.chat.rendering import Rendered
from lora_sft.training.job import Job

SUPERVISED = "bold green"


def conversation_view(rendered: Rendered, title: str, supervised_tokens: int, tokens: int) -> RenderableType:
    """A rendered conversation, the part that is learned highlighted; without colours it is set in «»."""
    text = Text()
    position = 0
    for start, end in rendered.supervised:
        text.append(rendered.text[position:start], "dim").append("«").append(rendered.text[start:end], SUPERVISED).append("»")
        position = end
    text.append(rendered.text[position:], "dim")
    return Panel(text, title=title, subtitle=f"«learned»: {supervised_tokens:,} of {tokens:,} tokens", title_align="left", subtitle_align="left")


def data_view(job: Job) -> RenderableType:
    """The first example and the counts of the data."""
    table = Table("data", "examples", "tokens", "learned", "too long, dropped", "no reply left, dropped", "cut")
    for name, prepared in (("train", job.train), ("evaluation", job.evaluation)):
        if prepared is not None:
            counts = (len(prepared.examples), prepared.tokens, prepared.supervised_tokens, len(prepared.too_long), len(prepared.without_reply), prepared.cut)
            table.add_row(name, *(f"{count:,}" for count in counts))
    first = job.train.examples[0]
    shown = conversation_view(job.train.first, f"first conversation: {first.source}", first.supervised_tokens, len(first.input_ids))
    return Group(shown, table)


def pairs_view(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table of texts."""
    table = Table(*columns, title=title, show_lines=True, title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
