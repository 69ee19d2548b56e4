"""Ours beside plain TRL: time, memory and loss of a QLoRA step, in one interleaved run.

`python -m bench.training [--model A] [--data alpaca] [--steps 4] [--rounds 1] [--dtype bf16] [--full] [--json FILE]
[--plot FILE]` races both sides, each in a process of its own, step by step in turn, on one thread. With `--scaling`,
`--floor` or `--curves` it measures these instead. Ends with 3 where the losses do not agree.

Models have random weights; NF4 with double quantization, rank 16 on every linear layer, AdamW at 2e-4, micro-batches of
8 rows. `the same batches`: the rows in one order. `any batches`: each side's own ways to fill them,
two steps more, compared by supervised tokens a second.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.training import curves, floor, scaling
from bench.training.cases import choose_dtype, shared_by_all, sides_of_any_batches, sides_of_same_batches
from bench.training.models import SHAPES
from bench.training.plots import plot_races, refuse_without_plots
from bench.training.race import Taken, race
from bench.training.rows import FILES
from bench.training.summary import as_json, disagreeing, summarize, table

DATA_DIR = Path(__file__).parents[2] / "shared" / "data"
CASES = (("A", "alpaca"), ("A", "tools"), ("B", "alpaca"), ("C", "alpaca"))
"""What runs where nothing is asked for; the first also with batches of any kind."""
CPU_MODELS = ("A", "B", "C")
STEPS, MORE_STEPS = 4, 2


def has_cuda() -> bool:
    """Asked in a process of its own, so that this one stays small."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def machine() -> dict[str, str]:
    """Where and with what was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    return {"date": str(date.today()), "processor": processor or platform.processor()} | {n: version(n) for n in names}


def best_first(races: list[dict[str, Taken]]) -> list[dict[str, Taken]]:
    """TRL's fastest way first, which makes it the one that the others are measured by."""
    lines = summarize(races, same_batches=False)
    best = max((line for line in lines if line.side.startswith("TRL")), key=lambda line: line.supervised_per_second)
    return [{best.side: taken[best.side]} | taken for taken in races]


def compare(model: str, data: str, options: argparse.Namespace, dtype: str, any_batches: bool) -> dict[str, Any]:
    """One case: prints its table, and gives it for the file."""
    # Steps differ more where each side fills batches in its own way, and so more of them are taken.
    steps = (options.steps or STEPS) + (MORE_STEPS if any_batches else 0)
    common, workload = shared_by_all(model, data, options.data_dir, steps, dtype)
    sides = sides_of_any_batches(common, data) if any_batches else sides_of_same_batches(common, options.full)
    races = [race(sides) for _ in range(options.rounds)]
    lines = summarize(best_first(races) if any_batches else races, not any_batches)
    kind = "any" if any_batches else "the same"
    times = f"{options.rounds} × {common['steps']} steps"
    print(f"\n{model}, {data} ({workload.described}), {dtype}, {kind} batches, {times}")
    print(table(lines), flush=True)
    wrong = disagreeing(lines)
    for words in wrong:
        print(words)
    name = f"{model}, {data}" + (", any batches" if any_batches else "")
    return {"case": name, "rows": workload.described, "dtype": dtype, "lines": as_json(lines), "disagreeing": wrong}


def cases_of(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Models and workloads that were asked for and can run here; why others cannot is said."""
    if options.model is None and options.data is None:
        return list(CASES)
    everything = [*CPU_MODELS, *(model for model, shape in SHAPES.items() if shape.needs_cuda)]
    models = {None: list(CPU_MODELS), "all": everything}.get(options.model, [options.model])
    if any(SHAPES[model].needs_cuda for model in models) and not has_cuda():
        for model in (model for model in models if SHAPES[model].needs_cuda):
            print(f"{model}: left out, there is no CUDA device here")
        models = [model for model in models if not SHAPES[model].needs_cuda]
    workloads = ["alpaca"] if options.data is None else list(FILES) if options.data == "all" else [options.data]
    return [(model, data) for model in models for data in workloads]


def refuse_model(model: str | None, what: str) -> None:
    """Scaling, floor and curves are of one model that runs here.

    Raises:
        SystemExit: this one does not.
    """
    if model == "all":
        raise SystemExit(f"--{what} is of one model; name it with --model: {', '.join(SHAPES)}")
    if model is not None and SHAPES[model].needs_cuda and not has_cuda():
        raise SystemExit(f"--{what}: there is no CUDA device here for {model}; use A, B or C")


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=[*SHAPES, "all"], help="default: those of the four cases")
    parser.add_argument("--data", choices=[*FILES, "all"])
    parser.add_argument("--steps", type=int, help=f"of a race ({STEPS}, the first warms up) or a curve (100)")
    parser.add_argument("--rounds", type=int, default=1, help="races, each in new processes")
    parser.add_argument("--dtype", choices=["bf16", "fp32", "best"], default="best")
    parser.add_argument("--full", action="store_true", help="also checkpointing, and any batches for every case")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="where the files of conversations lie")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--plot", type=Path, help="draw it to this file, .png or .svg")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--scaling", action="store_true", help="against length, batch, vocabulary and rank")
    kinds.add_argument("--floor", action="store_true", help="against what the machine can do at most")
    kinds.add_argument("--curves", action="store_true", help="losses of 100 steps")
    return parser.parse_args(words)


def main(words: Sequence[str] = ()) -> None:
    """Measures what the words ask for; `SystemExit(3)` where losses do not agree."""
    options = read_options(words)
    if options.plot:
        refuse_without_plots()
    dtype = choose_dtype(options.dtype, options.data_dir)
    found: dict[str, Any] = {"machine": machine(), "dtype": dtype}
    print(json.dumps(found["machine"]))
    for name, part in (("scaling", scaling), ("floor", floor), ("curves", curves)):
        if getattr(options, name):
            refuse_model(options.model, name)
            found[name] = part.measure(dtype, options)
            break
    else:
        cases = cases_of(options)
        found["cases"] = [compare(model, data, options, dtype, any_batches=False) for model, data in cases]
        asked_for_nothing = options.model is None and options.data is None
        for model, data in cases if options.full else cases[:1] if asked_for_nothing else []:
            found["cases"].append(compare(model, data, options, dtype, any_batches=True))
        if options.plot:
            plot_races(found["cases"], options.plot)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if any(case["disagreeing"] for case in found.get("cases", [])) or found.get("curves", {}).get("disagreeing"):
        raise SystemExit(3)


if __name__ == "__main__":
    main(sys.argv[1:])
