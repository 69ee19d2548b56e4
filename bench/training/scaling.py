"""Step time and memory against sequence length, batch, vocabulary and rank: ours and plain TRL's.

Rows are random tokens of one length, of which the second half is learned.
"""

import argparse
import json
import random
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.training import CACHE
from bench.training.models import LEARNED_TOKENS, SHAPES, make_adapter, make_model
from bench.training.race import Taken, race
from bench.training.side import Side

LENGTHS = (128, 256, 512, 1024, 2048)
BATCHES = (1, 4, 16)
VOCABULARIES = (32_000, 64_000, 151_936)
RANKS = (4, 16, 64)
LENGTH, BATCH = 256, 4
"""Where the other three are varied."""
REPEATS = 2

Point = dict[str, Any]


def write_rows(lengths: Iterable[int]) -> Path:
    """Random rows of these lengths, one after the other."""
    draw = random.Random(0)
    rows = []
    for length in lengths:
        ids = [draw.randrange(3, LEARNED_TOKENS) for _ in range(length)]
        rows.append((ids, [-100] * (length // 2) + ids[length // 2 :]))
    text = json.dumps(rows)
    file = CACHE / "rows" / f"random-{zlib.crc32(text.encode()):08x}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def point(value: int, taken: dict[str, Taken], steps: slice) -> Point:
    """{"value", side: {"seconds": the least of these steps, "risen_bytes": their peak above the start}}."""
    found: Point = {"value": value}
    for name, one in taken.items():
        some = one.steps[steps]
        risen = max(step.peak_bytes for step in some) - one.held_bytes
        found[name] = {"seconds": min(step.seconds for step in some), "risen_bytes": risen}
    return found


def _race(model: Path, rows: Path, steps: int, micro_batch: int, dtype: str, device: str, rank: int = 16) -> Any:
    """TRL and ours on the rows as they stand."""
    adapter = make_adapter(model, rank=rank)
    common: dict[str, Any] = {"model": str(model), "rows": str(rows), "adapter": str(adapter), "rank": rank}
    common |= {"steps": steps, "micro_batch": micro_batch, "dtype": dtype, "device": device}
    return race({"TRL": Side("trl", **common), "ours": Side("ours", **common)})


def measure(dtype: str, options: argparse.Namespace) -> dict[str, list[Point]]:
    """Prints a line a point, and gives them all: {"length", "batch", "vocabulary", "rank": points}."""
    name, data_dir = options.model or "A", options.data_dir
    model, device = make_model(name, data_dir), "cuda" if SHAPES[name].needs_cuda else "cpu"
    steps = 1 + REPEATS
    # All lengths in one run: the first step warms up, and every length is measured by itself.
    one_row = [LENGTHS[0], *(length for length in LENGTHS for _ in range(REPEATS))]
    taken = _race(model, write_rows(one_row), len(one_row), 1, dtype, device)
    found: dict[str, list[Point]] = {"length": []}
    for place, length in enumerate(LENGTHS):
        found["length"].append(point(length, taken, slice(1 + place * REPEATS, 1 + (place + 1) * REPEATS)))
    same = slice(1, None)
    rows = write_rows([LENGTH] * max(BATCHES) * steps)
    found["batch"] = [point(size, _race(model, rows, steps, size, dtype, device), same) for size in BATCHES]
    found["vocabulary"] = [
        point(size, _race(make_model(name, data_dir, vocab_size=size), rows, steps, BATCH, dtype, device), same)
        for size in VOCABULARIES
    ]
    found["rank"] = [point(rank, _race(model, rows, steps, BATCH, dtype, device, rank), same) for rank in RANKS]
    for against, points in found.items():
        for one in points:
            print(f"{against} {one['value']}: " + ", ".join(_in_words(side, one[side]) for side in ("TRL", "ours")))
    if options.plot:
        from bench.training.plots import plot_scaling

        plot_scaling(found, options.plot)
    return found


def _in_words(side: str, numbers: dict[str, float]) -> str:
    return f"{side} {numbers['seconds']:.2f} s and {numbers['risen_bytes'] / 1e6:.0f} MB"
