"""How long the quick commands take, against a Python process that imports click and pydantic.

`python -m bench.start_up [ROUNDS]` runs all of them in turn, round by round, and prints ratios of medians.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

# What any command line made of click and pydantic loads before it can do anything. (A bare `import pydantic` loads
# next to nothing: the package fetches its names at first use.)
BASELINE = [sys.executable, "-c", "import click; from pydantic import BaseModel, Field"]
COMMANDS = (["--help"], ["templates"], ["init", "-"], ["schema"], ["train", "--help"])
BOUND = 1.5


def seconds(words: list[str]) -> float:
    """Wall-clock seconds of one process."""
    clock = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - clock


def main(rounds: int = 15) -> None:
    """Prints a line a command, and the whole as JSON."""
    program = str(Path(sys.executable).with_name("lora-sft"))
    runs = {"baseline": BASELINE} | {" ".join(words): [program, *words] for words in COMMANDS}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, words in runs.items():
            taken[name].append(seconds(words))
    median = {name: statistics.median(times) for name, times in taken.items()}
    ratios = {name: round(median[name] / median["baseline"], 2) for name in runs if name != "baseline"}
    print(f"baseline, python importing click and pydantic: {median['baseline'] * 1000:.0f} ms (median of {rounds})")
    for name, ratio in ratios.items():
        verdict = "within" if ratio <= BOUND else "above"
        print(f"lora-sft {name}: {median[name] * 1000:.0f} ms, {ratio:.2f} times the baseline, {verdict} {BOUND}")
    print(json.dumps({"baseline_seconds": median["baseline"], "ratios": ratios}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
