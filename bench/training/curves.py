"""Losses of 100 steps of both sides from the same adapters → how far ours lie from plain TRL's, beside its own spread.

Three adapters are drawn; every side starts from each of them and sees the same batches. TRL trains the adapter of a
quantized model in bfloat16, we in float32; TRL with its adapter left in float32 is run too, and tells the two apart.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from bench.training.cases import shared_by_all
from bench.training.models import make_adapter
from bench.training.race import race
from bench.training.side import Side

SEEDS = (0, 1, 2)
STEPS = 100
MICRO_BATCH = 2
TRL, TRL_FLOAT32, OURS = "TRL", "TRL, float32 adapter", "ours"

Curve = list[float]


def mean_apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean over the steps of the distance between two curves, in nats."""
    return statistics.fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def distances(curves: Mapping[str, Sequence[Curve]]) -> dict[str, float]:
    """Curves of each side, one a seed → distances in nats.

    Returns:
        {"between TRL's seeds", "TRL to TRL, float32 adapter", "TRL to ours", "TRL, float32 adapter to ours"}.
    """
    seeds = [mean_apart(one, other) for one, other in combinations(curves[TRL], 2)]
    found = {"between TRL's seeds": statistics.fmean(seeds)}
    for first, second in combinations((TRL, TRL_FLOAT32, OURS), 2):
        pairs = zip(curves[first], curves[second], strict=True)
        found[f"{first} to {second}"] = statistics.fmean(mean_apart(one, other) for one, other in pairs)
    return found


def measure(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs all curves, prints the distances, and gives them with the losses."""
    steps = STEPS if options.steps is None else options.steps
    common, workload = shared_by_all(options.model or "small", options.data or "alpaca", options.data_dir, steps, dtype)
    common["micro_batch"] = MICRO_BATCH
    curves: dict[str, list[Curve]] = {TRL: [], TRL_FLOAT32: [], OURS: []}
    for seed in SEEDS:
        start = common | {"seed": seed, "adapter": str(make_adapter(Path(common["model"]), seed))}
        sides = {
            TRL: Side("trl", **start),
            TRL_FLOAT32: Side("trl", **start, keeps_float32=True),
            OURS: Side("ours", **start),
        }
        for name, taken in race(sides).items():
            curves[name].append([step.loss for step in taken.steps])
    found = distances(curves)
    print(f"\n{steps} steps, {workload.described}, {dtype}, seeds {SEEDS}; mean distance of the losses, in nats:")
    for what, distance in found.items():
        print(f"{what}: {distance:.2e}")
    seeds = found["between TRL's seeds"]
    near = found[f"{TRL} to {OURS}"]
    wrong = [] if near <= seeds else [f"ours is {near:.1e} from TRL, whose seeds are only {seeds:.1e} apart"]
    for words in wrong:
        print(words)
    if options.plot:
        from bench.training.plots import plot_curves

        plot_curves(curves, options.plot)
    return {"distances": found, "losses": curves, "disagreeing": wrong}
