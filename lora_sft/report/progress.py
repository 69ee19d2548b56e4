"""A running training → a live bar on a terminal, plain lines elsewhere."""

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lora_sft.console import console
from lora_sft.training.progress import Metrics

SECONDS_BETWEEN_LINES = 5.0


class LiveDisplay:
    """A listener of the trainer: loss, learning rate, tokens per second, time left."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._total = self._first = 0
        self._clock = self._last_line = 0.0

    def started(self, total_steps: int, first_step: int) -> None:
        """Opens the bar."""
        self._total, self._first = total_steps, first_step
        self._clock, self._last_line = time.perf_counter(), 0.0
        if console().is_terminal:
            columns = (
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console(), transient=False)
            self._bar.add_task("training", total=total_steps, completed=first_step, numbers="")
            self._bar.start()

    def stepped(self, step: int) -> None:
        """Moves the bar on."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def logged(self, step: int, metrics: Metrics) -> None:
        """Shows the numbers; evaluations stay as lines of their own."""
        if "eval_loss" in metrics:
            self._line(
                f"step {step}/{self._total}  evaluation: loss {metrics['eval_loss']:.4f}  token accuracy "
                f"{metrics['eval_mean_token_accuracy']:.1%}"
            )
        elif self._bar:
            self._bar.update(self._bar.task_ids[0], numbers=_numbers(metrics))
        elif (
            step == self._total
            or step <= self._first + 1
            or time.perf_counter() - self._last_line >= SECONDS_BETWEEN_LINES
        ):
            self._last_line = time.perf_counter()
            done = max(step - self._first, 1)
            left = (time.perf_counter() - self._clock) / done * (self._total - step)
            self._line(f"step {step}/{self._total}  {_numbers(metrics)}  {_clock(left)} left")

    def ended(self) -> None:
        """Closes the bar."""
        if self._bar:
            self._bar.stop()

    def _line(self, words: str) -> None:
        console().print(Text(words), soft_wrap=True)


def _numbers(metrics: Metrics) -> str:
    speed = f"  {metrics['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in metrics else ""
    return f"loss {metrics.get('loss', float('nan')):.4f}  lr {metrics.get('learning_rate', 0):.1e}{speed}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
