"""A blueprint → what the sizes of its family need, by context length, and how long a context fits on which card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from lora_sft.planning.devices import CARDS, Device
from lora_sft.planning.families import relatives
from lora_sft.planning.plan import usable_bytes
from lora_sft.planning.subject import Blueprint, Subject
from lora_sft.planning.trial import Recompute, Slopes
from lora_sft.planning.workload import Workload, computed_tokens
from lora_sft.training.batching import Batching

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
ON_CARDS = ("rtx4060", "rtx3060", "rtx4080", "rtx4090", "rtx5090", "rtxa6000", "h100")
"""8, 12, 16, 24, 32, 48 and 80 GB."""


@dataclass(frozen=True)
class Table:
    """Micro-batches of one row, all layers recomputed: the least that QLoRA (or what is asked for) needs.

    Attributes:
        name: of the family, and how it is loaded.
        lengths: of the context, in tokens.
        needed: {size: bytes at each length}.
        cards: {card: bytes that a plan may use}.
    """

    name: str
    lengths: Sequence[int]
    needed: Mapping[str, Sequence[int]]
    cards: Mapping[str, int]

    def longest(self, size: str, card: str) -> int | None:
        """The longest of the lengths that fits; None: not even the shortest does."""
        fitting = [n for n, need in zip(self.lengths, self.needed[size], strict=True) if need <= self.cards[card]]
        return max(fitting, default=None)

    def to_json(self) -> dict[str, Any]:
        """{"lengths", "needed_bytes": {size: […]}, "longest": {size: {card: tokens or null}}}."""
        return {
            "name": self.name,
            "lengths": list(self.lengths),
            "needed_bytes": {size: list(row) for size, row in self.needed.items()},
            "longest": {size: {card: self.longest(size, card) for card in self.cards} for size in self.needed},
        }


def make_table(plan: Blueprint, lengths: Sequence[int] = LENGTHS, cards: Sequence[str] = ON_CARDS) -> Table:
    """Simulates the smallest step of each size at each length, for the cards that compute in bfloat16."""
    device = replace(CARDS["rtx4090"], name="rtx4090")
    spec = replace(plan.spec, dtype="bfloat16" if plan.spec.dtype != "float32" else "float32", device="cuda")
    needed = {}
    for size, shape in relatives(plan.shape).items():
        row, subjects = [], dict[int, Subject]()
        for length in lengths:
            config = plan.config.model_copy(update={"per_device_train_batch_size": 1, "max_length": length})
            row.append(_least(Blueprint(shape, spec, config), device, length, subjects))
        needed[size] = row
    how = plan.spec.quantization or plan.spec.dtype
    usable = {name: usable_bytes(CARDS[name]) for name in cards}
    return Table(f"{plan.shape.model_type}, {how}, rank {plan.config.lora_r}", tuple(lengths), needed, usable)


def _least(plan: Blueprint, device: Device, length: int, subjects: dict[int, Subject]) -> int:
    work = Workload.of_lengths([length], length)
    batch = work.largest(Batching(1, length, one_row=True))
    assert computed_tokens(batch) == length
    return int(Slopes(plan, device, batch, subjects=subjects).at(Recompute(plan.layers))[0])


def picture_of(table: Table) -> str:
    """The table as SVG: a row a size, a column a length; the colour tells the smallest card on which it fits."""
    width, height, left, top = 96, 34, 70, 64
    cards = sorted(table.cards, key=lambda card: table.cards[card])
    colours = ("#1a7f37", "#57ab5a", "#a5cf5f", "#e3c04b", "#e29a3f", "#d4703a", "#b8472e")
    shapes = [f'<text x="8" y="20" font-weight="bold">{escape(table.name)}: GiB needed, micro-batch 1</text>']
    for column, length in enumerate(table.lengths):
        shapes.append(f'<text x="{left + column * width + 8}" y="{top - 8}">{length:,}</text>')
    for row, (size, needs) in enumerate(table.needed.items()):
        y = top + row * height
        shapes.append(f'<text x="8" y="{y + 21}">{escape(size)}</text>')
        for column, need in enumerate(needs):
            place = next((n for n, card in enumerate(cards) if need <= table.cards[card]), None)
            fill = "#777" if place is None else colours[min(place, len(colours) - 1)]
            ink = "#111" if fill in colours[1:5] else "#fff"
            x = left + column * width
            shapes.append(f'<rect x="{x}" y="{y}" width="{width - 3}" height="{height - 3}" fill="{fill}" rx="3"/>')
            shapes.append(f'<text x="{x + 8}" y="{y + 21}" fill="{ink}">{need / 2**30:.1f}</text>')
    bottom = top + len(table.needed) * height + 24
    for n, card in enumerate([*cards, "none of them"]):
        x = 8 + n * 92
        fill = colours[min(n, len(colours) - 1)] if n < len(cards) else "#777"
        shapes.append(f'<rect x="{x}" y="{bottom - 10}" width="12" height="12" fill="{fill}"/>')
        shapes.append(f'<text x="{x + 16}" y="{bottom}">{escape(card)}</text>')
    size = f'width="{max(left + len(table.lengths) * width, 100 * (len(cards) + 1)) + 8}" height="{bottom + 16}"'
    style = 'font-family="system-ui, sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(shapes)}</svg>\n'
