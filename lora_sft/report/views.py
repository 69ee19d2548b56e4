"""Values of the journey → tables and highlighted text: rich on a terminal, plain lines elsewhere."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lora_sft.chat.check import EXACT, REFUSED, UNSUPPORTED, WRONG, Finding
from lora_sft.chat.labels import Preview
from lora_sft.chat.rendering import Rendered
from lora_sft.chat.turns import HARMFUL
from lora_sft.console import console, table_of
from lora_sft.preparation.validation import Report
from lora_sft.report.pieces import pieces_of
from lora_sft.training.job import Job

SUPERVISED = "bold green"
SHADES = {True: ("black on green", "black on bright_green"), False: ("dim", "dim reverse")}
"""Styles of tokens that are learned, and of those that are not; neighbours take turns."""


def tokens_view(preview: Preview) -> RenderableType:
    """A previewed conversation, token by token on a terminal: neighbours differ in shade, what is learned is green."""
    example, rendered = preview.example, preview.rendered
    notes = [Text(f"reply {note.turn + 1}: {note.status}: {note.words}", "yellow") for note in rendered.notes]
    notes += [Text(preview.warning, "yellow")] if preview.warning else []
    if not console(results=True).is_terminal:
        view = conversation_view(rendered, preview.source, example.supervised_tokens, len(example.input_ids))
        return Group(view, *notes)
    text = Text()
    for place, piece in enumerate(pieces_of(rendered.text, preview.tokens, example.labels)):
        text.append(piece.text.replace("\n", "↵\n"), SHADES[piece.is_learned][place % 2])
    counts = f"green: learned, {example.supervised_tokens:,} of {len(example.input_ids):,} tokens"
    return Group(Panel(text, title=preview.source, subtitle=counts, title_align="left", subtitle_align="left"), *notes)


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
    table = table_of("data", "examples", "tokens", "learned", "dropped: too long", "dropped: no reply", "rows cut")
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
    parts: list[RenderableType] = [table]
    if any(prepared is not None and prepared.noted for prepared in (job.train, job.evaluation)):
        parts.append(_notes_table(job))
    first = job.train.first
    shown = conversation_view(first.rendered, f"first conversation: {first.source}", first.learned, first.tokens)
    return Group(shown, *parts)


def _notes_table(job: Job) -> Table:
    """How many replies are not simply exact, and an example of each kind."""
    table = table_of("data", "status", "times", "for example")
    for name, prepared in (("train", job.train), ("evaluation", job.evaluation)):
        for status, count in (prepared.noted if prepared else {}).items():
            example = prepared.examples_of[status][0] if prepared else ""
            table.add_row(name, status, f"{count:,}", Text(example))
    return table


def replies_view(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts, side by side."""
    table = table_of(*columns, title=title, show_lines=console().is_terminal)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def findings_view(title: str, findings: Sequence[Finding]) -> RenderableType:
    """How a template fares with each scenario, and the counts."""
    colours = {EXACT: "green", UNSUPPORTED: "dim", WRONG: "bold red", REFUSED: "red", **dict.fromkeys(HARMFUL, "red")}
    table = table_of("scenario", "status", "", title=title)
    for finding in findings:
        words = finding.words[0].splitlines()[0] if finding.words else ""
        table.add_row(finding.scenario, Text(finding.status, colours.get(finding.status, "yellow")), Text(words))
    counts = Counter(finding.status for finding in findings)
    return Group(table, Text(", ".join(f"{count} {status}" for status, count in counts.most_common())))


def report_view(report: Report, limit: int) -> RenderableType:
    """What `validate` found: problems first, then the numbers."""
    parts: list[RenderableType] = []
    if report.problems:
        problems = table_of("where", "what", "what to do")
        for problem in report.problems[:limit]:
            where = f"{problem.source}: {problem.field}" if problem.field else problem.source
            style = "red" if problem.is_grave else "yellow"
            problems.add_row(Text(where), Text(problem.problem, style), Text(problem.fix))
        parts.append(problems)
        if (rest := len(report.problems) - limit) > 0:
            parts.append(Text(f"… and {rest:,} more (--limit, --json)"))
    if spread := report.percentiles():
        table = table_of("of a row", *(f"{p} %" for p in next(iter(spread.values()))))
        for name, values in spread.items():
            table.add_row(name, *(f"{value:,}" for value in values.values()))
        parts.append(table)
    if report.lengths:
        total = sum(report.lengths)
        table = table_of("tokens", "count", "share")
        for name, count in [*report.tokens.most_common(), ("learned", sum(report.supervised)), ("all", total)]:
            table.add_row(name, f"{count:,}", f"{count / total:.1%}")
        parts.append(table)
    layouts = ", ".join(f"{count:,} {name}" for name, count in report.layouts.items())
    counts = f"{report.rows:,} rows ({layouts or 'none usable'}): {report.usable:,} can be trained on"
    parts.append(
        Text(f"{counts}; {report.grave:,} problems, {report.duplicates:,} repeated, {report.too_long:,} too long")
    )
    return Group(*parts)


def measures_view(found: dict[str, Any]) -> RenderableType:
    """What `evaluate` returns, an adapter beside its base."""
    columns = ("adapter", "base") if "base_loss" in found else ("model",)
    table = table_of("", *columns)
    for name, form in (("loss", "{:.4f}"), ("perplexity", "{:,.2f}"), ("token_accuracy", "{:.1%}")):
        values = (found[name], found.get(f"base_{name}"))
        table.add_row(name.replace("_", " "), *(form.format(value) for value in values if value is not None))
    seen = f"{found['examples']:,} conversations, {found['supervised_tokens']:,} tokens of replies"
    return Group(table, Text(f"{seen}; {found['too_long']:,} left out as too long"))
