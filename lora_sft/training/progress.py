"""What the trainer reports while it runs → lines of `metrics.jsonl` and whoever else listens."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Metrics = dict[str, float]


class Listener(Protocol):
    """Somebody who follows a run: the live display, a notebook, a test."""

    def started(self, total_steps: int, first_step: int) -> None:
        """Called once; `first_step` is above 0 in a resumed run."""

    def stepped(self, step: int) -> None:
        """Called after every optimizer step."""

    def logged(self, step: int, metrics: Metrics) -> None:
        """Called with loss, learning_rate, tokens_per_second and so on, or with eval_loss and so on."""

    def ended(self) -> None:
        """Called once, also when the run fails."""


class MetricsFile:
    """A listener that appends a JSON line for every log: {"step": 3, "loss": 1.2, …}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []

    def _until(self, step: int) -> list[dict[str, Any]]:
        """The lines in the file up to a step."""
        kept = self.path.read_text(encoding="utf-8").splitlines() if step and self.path.is_file() else []
        return [line for line in map(json.loads, kept) if line["step"] <= step]

    def started(self, total_steps: int, first_step: int) -> None:
        """A resumed run goes on in the same file, without the lines of the steps that it repeats."""
        self.lines = self._until(first_step)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")

    def stepped(self, step: int) -> None:
        """Nothing to write."""

    def logged(self, step: int, metrics: Metrics) -> None:
        """Appends one line."""
        self.lines.append({"step": step, **metrics})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")

    def ended(self) -> None:
        """The file is closed after every line."""


class Reporter(TrainerCallback):
    """Passes what transformers' trainer says on to the listeners, with tokens per second added."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = listeners
        self._tokens = 0.0
        self._clock = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._clock = time.perf_counter()
        for listener in self.listeners:
            listener.started(state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the display on."""
        for listener in self.listeners:
            listener.stepped(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Metrics | None = None,
        **kwargs: Any,
    ) -> None:
        """Passes the numbers on; the closing summary of the trainer is left out, the run makes its own."""
        metrics = dict(logs or {})
        if "train_runtime" in metrics:
            return
        if "num_tokens" in metrics and "loss" in metrics:
            now = time.perf_counter()
            metrics["tokens_per_second"] = round(
                (metrics["num_tokens"] - self._tokens) / max(now - self._clock, 1e-9), 1
            )
            self._tokens, self._clock = metrics["num_tokens"], now
        for listener in self.listeners:
            listener.logged(state.global_step, metrics)
