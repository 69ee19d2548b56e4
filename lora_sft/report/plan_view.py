"""A plan → what a person looks at: the verdict, what the memory is for, the time, and what was looked at."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from lora_sft.console import table_of
from lora_sft.planning.plan import Plan, Rung
from lora_sft.planning.table import Table
from lora_sft.training.recompute import gib

BAR = 28
"""Characters of the longest bar."""

SMALL = 1000
"""Parts that are so many times smaller than the largest are told together."""


def plan_view(plan: Plan) -> RenderableType:
    """The whole plan."""
    parts: list[RenderableType] = [_verdict(plan), _memory(plan), _numbers(plan)]
    if plan.ladder:
        parts.append(ladder_view(plan.ladder))
    return Group(*parts, *(Text(f"· {note}", "dim") for note in plan.assumptions))


def ladder_view(ladder: Sequence[Rung]) -> RenderableType:
    """What was looked at: one line a way to split the batch of a step."""
    columns = ("", "micro-batch", "accumulation", "gradient_checkpointing", "optim", "needs", "seconds a step")
    table = table_of(*columns, title="settings that were looked at")
    for rung in ladder:
        style = "bold green" if rung.chosen else "" if rung.fits else "red"
        cells = (
            "→" if rung.chosen else "" if rung.fits else "does not fit",
            str(rung.micro_batch),
            str(rung.accumulation),
            str(rung.gradient_checkpointing).lower(),
            rung.optim,
            gib(rung.needed_bytes),
            f"{rung.seconds_per_step:.3g}",
        )
        table.add_row(*(Text(cell, style) for cell in cells))
    return table


def _verdict(plan: Plan) -> Text:
    words = f"{'fits' if plan.fits else 'does not fit'}: {gib(plan.peak.needed)} of {gib(plan.device.bytes)}"
    doubt = "" if plan.certainty == "simulated" else " (uncertain)"
    return Text.assemble((words, "bold green" if plan.fits else "bold red"), f" on {plan.device.name}{doubt}")


def _memory(plan: Plan) -> RichTable:
    table = table_of("memory at the peak", "", "", title=f"peak: {gib(plan.peak.allocated)}, at {plan.peak.operation}")
    largest = max(plan.peak.parts.values())
    parts = {part: count for part, count in plan.peak.parts.items() if count >= largest / SMALL}
    parts["all else"] = plan.peak.allocated - sum(parts.values())
    parts["kept by the allocator, context"] = plan.peak.needed - plan.peak.allocated
    for part, count in parts.items():
        if count:
            table.add_row(part, gib(count), "█" * round(BAR * count / largest) or "▏")
    return table


def _numbers(plan: Plan) -> RichTable:
    table = table_of("", "")
    table.show_header = False
    low, high = 1 - plan.unsure, 1 + plan.unsure
    step, epoch = plan.seconds_per_step, plan.steps_per_epoch * plan.seconds_per_step
    rows = {
        "a step": f"{duration(low * step)} to {duration(high * step)}",
        "an epoch": f"{plan.steps_per_epoch:,} steps, {duration(low * epoch)} to {duration(high * epoch)}",
        "the run": f"{plan.steps:,} steps, {duration(low * plan.seconds)} to {duration(high * plan.seconds)}",
        "on disk": ", ".join(f"{what} {gib(count)}" for what, count in plan.disk_bytes.items()),
    }
    if plan.host_bytes:
        rows["memory of the host"] = gib(plan.host_bytes)
    shown = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "optim")
    rows["settings"] = ", ".join(f"{name}: {str(plan.settings[name]).lower()}" for name in shown)
    for name, words in rows.items():
        table.add_row(name, Text(words))
    return table


def duration(seconds: float) -> str:
    """`850 ms`, `12 s`, `3 min`, `2.5 h`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table_view(found: Table) -> RenderableType:
    """GiB by size and length, and the longest context by size and card."""
    lengths = table_of(
        "", *(f"{length:,}" for length in found.lengths), title=f"{found.name}: needs, by context length"
    )
    for size, row in found.needed.items():
        lengths.add_row(size, *(gib(need) for need in row))
    cards = table_of("", *found.cards, title="longest context that fits, in tokens")
    for size in found.needed:
        longest = (found.longest(size, card) for card in found.cards)
        cards.add_row(size, *(f"{length:,}" if length else "–" for length in longest))
    return Group(
        lengths,
        cards,
        Text("· micro-batches of one row, all layers recomputed; simulated, see docs/planning.md", "dim"),
    )
