"""A model and a workload → the sides of a race, ready to be started: what they share, and in what they differ."""

import importlib.util
from pathlib import Path
from typing import Any

from bench.training.models import SHAPES, make_adapter, make_model
from bench.training.race import race
from bench.training.rows import LONG, LONGEST, Workload, make_rows
from bench.training.side import Side
from bench.training.summary import summarize

MICRO_BATCH = 8


def shared_by_all(model: str, data: str, data_dir: Path, steps: int, dtype: str) -> tuple[dict[str, Any], Workload]:
    """The fields of `Side` that all sides of a case have in common, and the rows that they train on."""
    folder = make_model(model, data_dir)
    workload = make_rows(data, folder, data_dir)
    common = {
        "model": str(folder),
        "rows": str(workload.file),
        "adapter": str(make_adapter(folder)),
        "steps": steps,
        "dtype": dtype,
        "micro_batch": 1 if data == "long" else MICRO_BATCH,
        "device": "cuda" if SHAPES[model].needs_cuda else "cpu",
    }
    return common, workload


def sides_of_same_batches(common: dict[str, Any], full: bool) -> dict[str, Side]:
    """Plain TRL first, then its rivals, then ours; with `full` TRL and ours with checkpointing too."""
    sides = {"TRL": Side("trl", **common)}
    if full:
        sides["TRL, checkpointing"] = Side("trl", **common, recompute=True)
    if common["device"] == "cuda":
        rivals = {"liger_kernel": ("TRL with Liger", "liger"), "unsloth": ("Unsloth", "unsloth")}
        for package, (name, library) in rivals.items():
            if importlib.util.find_spec(package) is None:
                print(f"{name}: left out, {package} is not installed")
            else:
                sides[name] = Side(library, **common)
    sides["ours"] = Side("ours", **common)
    if full:
        sides["ours, checkpointing"] = Side("ours", **common, recompute=True)
    return sides


def sides_of_any_batches(common: dict[str, Any], data: str) -> dict[str, Side]:
    """TRL's ways to waste less on padding, and ours; packed rows are as long as the longest conversation may be."""
    grouped = common | {"order": "group_by_length"}
    size = LONG if data == "long" else LONGEST
    packed = common | {"order": "random", "packing": True, "micro_batch": 1, "max_length": size}
    return {
        "TRL, length-grouped": Side("trl", **grouped),
        "TRL, length-grouped, padding-free": Side("trl", **grouped, padding_free=True),
        "TRL, packed": Side("trl", **packed),
        "ours, length-grouped": Side("ours", **grouped),
        "ours, packed": Side("ours", **packed),
    }


def choose_dtype(wish: str, data_dir: Path) -> str:
    """`best` is the one in which plain TRL is faster here, found on a small model; others are taken as they are."""
    if wish != "best":
        return wish
    sides = {}
    for dtype in ("bf16", "fp32"):
        common, _ = shared_by_all("small", "alpaca", data_dir, 3, dtype)
        sides[dtype] = Side("trl", **(common | {"micro_batch": 2}))
    lines = summarize([race(sides)], same_batches=True)
    best = min(lines, key=lambda line: line.seconds).side
    print(f"dtype: {best} (TRL takes " + ", ".join(f"{line.seconds:.2f} s in {line.side}" for line in lines) + ")")
    return best
