"""What the sides of a race took → one line each: speed, memory, the ratio to the first side with its spread, losses."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import NamedTuple

from bench.training.race import Step, Taken

AGREEMENT = 1e-3
"""How far two losses may be apart, as a share of the first."""


class Spread(NamedTuple):
    """Lower quartile, median, upper quartile."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True)
class Line:
    """One side, beside the first one.

    Attributes:
        seconds: median of a step.
        supervised_per_second, tokens_per_second: all counted steps together, padding not counted.
        risen_bytes: rise of the memory above what stood before the first step.
        peak_bytes: of the whole process, model and libraries and all.
        ratio: how many times as fast as the first side.
        memory: `risen_bytes` over the first side's.
        apart: largest difference of a step's loss, as a share; None where the batches are not the same.
    """

    side: str
    seconds: float
    supervised_per_second: float
    tokens_per_second: float
    risen_bytes: int
    peak_bytes: int
    ratio: Spread
    memory: float
    apart: float | None


def spread(values: Sequence[float]) -> Spread:
    """Quartiles of at least one value."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(low, middle, high)


def apart(first: Taken, other: Taken) -> float:
    """The largest difference between the losses of two sides at one step, as a share of the first side's.

    Raises:
        ValueError: the sides did not train on the same batches.
    """
    if [(step.supervised, step.tokens) for step in first.steps] != [(s.supervised, s.tokens) for s in other.steps]:
        raise ValueError("the sides counted other tokens in their batches: these are not the same batches")
    return max(abs(one.loss - two.loss) / abs(one.loss) for one, two in zip(first.steps, other.steps, strict=True))


def _times_as_fast(first: Sequence[Step], other: Sequence[Step], same_batches: bool) -> Spread:
    """Step by step on the same batches; else the supervised tokens a second, every step with every step."""
    if same_batches:
        return spread([one.seconds / two.seconds for one, two in zip(first, other, strict=True)])
    return spread([two.supervised / two.seconds / (one.supervised / one.seconds) for one in first for two in other])


def summarize(races: Sequence[Mapping[str, Taken]], same_batches: bool) -> list[Line]:
    """Races of the same sides → a line a side; the first side is what the others are measured by."""
    names = list(races[0])
    steps = {name: list(chain.from_iterable(race[name].counted for race in races)) for name in names}
    risen = {name: max(race[name].risen_bytes for race in races) for name in names}
    lines = []
    for name in names:
        seconds = sum(step.seconds for step in steps[name])
        lines.append(
            Line(
                side=name,
                seconds=statistics.median(step.seconds for step in steps[name]),
                supervised_per_second=sum(step.supervised for step in steps[name]) / seconds,
                tokens_per_second=sum(step.tokens for step in steps[name]) / seconds,
                risen_bytes=risen[name],
                peak_bytes=max(step.peak_bytes for race in races for step in race[name].steps),
                ratio=_times_as_fast(steps[names[0]], steps[name], same_batches),
                memory=risen[name] / max(risen[names[0]], 1),
                apart=max(apart(race[names[0]], race[name]) for race in races) if same_batches else None,
            )
        )
    return lines


def disagreeing(lines: Sequence[Line]) -> list[str]:
    """What is to be said of sides whose losses are not those of the first; NaN agrees with nothing."""
    return [
        f"{line.side}: its loss is up to {line.apart:.1e} from that of {lines[0].side}, more than {AGREEMENT}"
        for line in lines
        if line.apart is not None and not line.apart <= AGREEMENT
    ]


def table(lines: Sequence[Line]) -> str:
    """The lines as a table in Markdown."""
    rows = [
        (
            "side",
            "s a step",
            "supervised tokens/s",
            "tokens/s",
            "times as fast (quartiles)",
            "memory of a step, MB",
            "share of it",
            "of the process, MB",
            "loss apart",
        ),
        *(
            (
                line.side,
                f"{line.seconds:.2f}",
                f"{line.supervised_per_second:.0f}",
                f"{line.tokens_per_second:.0f}",
                str(line.ratio),
                f"{line.risen_bytes / 1e6:.0f}",
                f"{line.memory:.2f}",
                f"{line.peak_bytes / 1e6:.0f}",
                "–" if line.apart is None else f"{line.apart:.0e}",
            )
            for line in lines
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def as_json(lines: Sequence[Line]) -> list[dict[str, object]]:
    """The lines for a file, the ratio as its quartiles."""
    return [asdict(line) | {"ratio": dict(line.ratio._asdict())} for line in lines]
