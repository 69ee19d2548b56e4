"""Sides → what each of their steps took, one side after the other, step by step, each in a process that stays alive."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.training.side import Side

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Step:
    """One optimizer step: from the go to its end, the making of its batch included.

    Attributes:
        seconds: of the CPU; with CUDA of the clock on the wall.
        peak_bytes: the most that the process held meanwhile.
        loss: mean over the supervised tokens, in nats, before the step.
        supervised, tokens: of its batch, without padding.
    """

    seconds: float
    peak_bytes: int
    loss: float
    supervised: int
    tokens: int


@dataclass
class Taken:
    """What a side took.

    Attributes:
        held_bytes: what its process held before the first step.
        steps: in order; the first one warms up.
    """

    held_bytes: int
    steps: list[Step] = field(default_factory=list)

    @property
    def risen_bytes(self) -> int:
        """How far the memory rose above what was held before the first step, at most."""
        return max(step.peak_bytes for step in self.steps) - self.held_bytes

    @property
    def counted(self) -> list[Step]:
        """The steps whose time counts: all but the first, in which caches and allocators are filled."""
        return self.steps[1:] or self.steps


class Runner:
    """A side in a process of its own."""

    def __init__(self, name: str, side: Side, folder: Path) -> None:
        self.name = name
        file = folder / f"{name}.json".replace("/", "-")
        file.write_text(side.to_json())
        self.errors = file.with_suffix(".err")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "bench.training.worker", str(file), str(file.with_suffix(""))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=Path(__file__).parents[1],
                env=os.environ | (ONE_THREAD if side.device == "cpu" else {}) | QUIET,
            )

    def heard(self, what: str) -> dict[str, Any]:
        """What the side says next.

        Raises:
            RuntimeError: it has died; with its last words.
        """
        out: IO[str] = self.process.stdout  # type: ignore[assignment]
        line = out.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"{self.name} ended without its {what}:\n{self.errors.read_text()[-3000:]}")
        return dict(json.loads(line)[what])

    def step(self) -> Step:
        """Lets it do one step."""
        go: IO[str] = self.process.stdin  # type: ignore[assignment]
        go.write("go\n")
        go.flush()
        return Step(**self.heard("step"))

    def stop(self) -> None:
        """Ends it where it is."""
        self.process.kill()
        self.process.communicate()


def race(sides: Mapping[str, Side]) -> dict[str, Taken]:
    """Lets all sides train their steps in turn: A B A B. Only one computes at a time.

    Raises:
        RuntimeError: a side died.
    """
    with tempfile.TemporaryDirectory() as name:
        runners = [Runner(side_name, side, Path(name)) for side_name, side in sides.items()]
        try:
            ready = [runner.heard("ready") for runner in runners]
            taken = {runner.name: Taken(start["held_bytes"]) for runner, start in zip(runners, ready, strict=True)}
            for number in range(max(start["steps"] for start in ready)):
                for runner, start in zip(runners, ready, strict=True):
                    if number < start["steps"]:
                        taken[runner.name].steps.append(runner.step())
        finally:
            for runner in runners:
                runner.stop()
    return taken
