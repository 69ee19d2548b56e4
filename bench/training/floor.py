"""Sizes of a model and lengths of conversations → the least work of a QLoRA step, and how near to it the sides come.

Counted from the shapes: each matrix product once forward and once for the gradient of its input, the products of the
adapters, attention below the diagonal, the head at the supervised positions only, and no gradient below the first
adapter. Nothing is recomputed, and no padding is computed. The machine's rates are measured on the spot.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.training.cases import shared_by_all, sides_of_same_batches
from bench.training.models import SHAPES
from bench.training.race import ONE_THREAD, Taken, race
from bench.training.summary import disagreeing, summarize, table

STEPS = 4
NF4_BYTES = 4.127 / 8
"""Of one weight with its doubly quantized scale."""

RATES = """
import json, sys, time, torch
torch.set_num_threads(1)
device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
clock = time.perf_counter if device == "cuda" else time.process_time
def seconds(action):
    taken = []
    for _ in range(7):
        if device == "cuda": torch.cuda.synchronize()
        start = clock()
        action()
        if device == "cuda": torch.cuda.synchronize()
        taken.append(clock() - start)
    return min(taken)
flops = 0.0
for rows, inner, columns in json.loads(sys.argv[3]):
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    flops = max(flops, 2 * rows * inner * columns / seconds(lambda: torch.mm(left, right.t(), out=out)))
source = torch.ones(1 << 26, device=device)
target = torch.zeros_like(source)
print(json.dumps({"flops": flops, "bytes": 2 * 4 * source.numel() / seconds(lambda: target.copy_(source))}))
"""


@dataclass(frozen=True)
class Work:
    """What a step must do at least.

    Attributes:
        operations: {part: floating-point operations}.
        traffic: {part: bytes that are read or written}.
    """

    operations: Mapping[str, float]
    traffic: Mapping[str, float]


def matrices(sizes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The linear layers of one decoder layer: {name: (inputs, outputs)}."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    head = sizes.get("head_dim", width // sizes["num_attention_heads"])
    queries, keys = head * sizes["num_attention_heads"], head * sizes["num_key_value_heads"]
    return {
        "q": (width, queries),
        "k": (width, keys),
        "v": (width, keys),
        "o": (queries, width),
        "gate": (width, inner),
        "up": (width, inner),
        "down": (inner, width),
    }


def work_of_step(
    sizes: Mapping[str, Any], lengths: Sequence[int], supervised: int, rank: int = 16, value_bytes: int = 2
) -> Work:
    """The least work of one step.

    Args:
        sizes: fields of the model's configuration, as in `models`.
        lengths: tokens of each conversation in the step.
        supervised: tokens that are learned.
        rank: of the adapter, on all linear layers.
        value_bytes: of an activation and of a dequantized weight.
    """
    tokens, layers = sum(lengths), sizes["num_hidden_layers"]
    shapes = matrices(sizes)
    weights = layers * sum(k * n for k, n in shapes.values())
    head_weights = sizes["hidden_size"] * sizes["vocab_size"]
    first = sum(k * n for name, (k, n) in shapes.items() if name in "qkv")  # their input needs no gradient
    first_inputs = sum(k for name, (k, _) in shapes.items() if name in "qkv")
    adapter = layers * rank * sum(k + n for k, n in shapes.values())
    attended = sum(length * (length + 1) // 2 for length in lengths)
    attention = 4 * layers * attended * shapes["q"][1]
    width, inner = shapes["down"][1], shapes["down"][0]
    kept = layers * tokens * (2 * width + 2 * shapes["q"][1] + 2 * shapes["k"][1] + 3 * inner)
    return Work(
        operations={
            "forward": 2 * tokens * weights,
            "input gradients": 2 * tokens * (weights - first),
            "adapters": 2 * tokens * (3 * adapter - rank * first_inputs),
            "attention": 3 * attention,
            "head": 4 * supervised * head_weights,
        },
        traffic={
            "4-bit weights": 2 * NF4_BYTES * weights,
            "dequantized weights": 2 * 2 * value_bytes * weights,
            "head": 2 * value_bytes * head_weights,
            "activations kept": 2 * value_bytes * kept,
            "optimizer": 4 * 8 * adapter,
        },
    )


def rates(device: str, dtype: str, sizes: Mapping[str, Any], tokens: int) -> dict[str, float]:
    """{"flops": of matrix products, the best of the model's shapes and a large square, "bytes": of a copy} a second."""
    shapes = [(tokens, k, n) for k, n in matrices(sizes).values()] + [(2048, 2048, 2048)]
    name = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    command = [sys.executable, "-c", RATES, device, name, json.dumps(shapes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | ONE_THREAD)
    return dict(json.loads(done.stdout))


def floor_of(work: Sequence[Work], rate: Mapping[str, float]) -> dict[str, float]:
    """{"arithmetic", "traffic": seconds of all these steps; "floor": the larger, as if they overlapped wholly}."""
    arithmetic = sum(sum(one.operations.values()) for one in work) / rate["flops"]
    traffic = sum(sum(one.traffic.values()) for one in work) / rate["bytes"]
    return {"arithmetic": arithmetic, "traffic": traffic, "floor": max(arithmetic, traffic)}


def seconds_of(taken: Taken) -> float:
    """Of the steps that count."""
    return sum(step.seconds for step in taken.counted)


def measure(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prints the parts of the floor and the share of it that each side reaches on one case."""
    model, data = options.model or "A", options.data or "alpaca"
    common, workload = shared_by_all(model, data, options.data_dir, options.steps or STEPS, dtype)
    taken = race(sides_of_same_batches(common, options.full))
    size, rows = common["micro_batch"], workload.rows()
    batches = [rows[start : start + size] for start in range(size, size * common["steps"], size)]
    work = [
        work_of_step(
            SHAPES[model].sizes,
            [len(ids) for ids, _ in batch],
            sum(label >= 0 for _, labels in batch for label in labels[1:]),
            value_bytes=2 if dtype == "bf16" else 4,
        )
        for batch in batches
    ]
    rate = rates(common["device"], dtype, SHAPES[model].sizes, sum(len(ids) for ids, _ in batches[0]))
    floor = floor_of(work, rate)
    shares = {name: floor["floor"] / seconds_of(one) for name, one in taken.items()}
    print(f"\n{model}, {data}, {dtype}: {rate['flops'] / 1e9:.0f} GFLOP/s, {rate['bytes'] / 1e9:.1f} GB/s copied")
    for kind, unit in (("operations", "GFLOP"), ("traffic", "GB")):
        parts = {part: sum(getattr(one, kind)[part] for one in work) / 1e9 for part in getattr(work[0], kind)}
        print(f"{unit}: " + ", ".join(f"{part} {value:.2f}" for part, value in parts.items()))
    print(", ".join(f"{part} {seconds:.2f} s" for part, seconds in floor.items()) + f" for {len(work)} steps")
    for name, share in shares.items():
        print(f"{name}: {seconds_of(taken[name]):.2f} s, {share:.0%} of the floor's speed")
    lines = summarize([taken], same_batches=True)
    print(table(lines))
    return {"rates": rate, "seconds": floor, "shares": shares, "disagreeing": disagreeing(lines)}
