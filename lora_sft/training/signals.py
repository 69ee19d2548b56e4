"""SIGINT, SIGTERM or SIGHUP → the running optimizer step is finished, a checkpoint is written, the run ends.

A second signal, a second later or more, ends the process at once: what comes within that second is the same wish, as
when a closing terminal or a launcher of several processes sends two.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_sft.console import say
from lora_sft.errors import RunError

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

SAME_WISH_SECONDS = 1.0


class StoppedError(RunError):
    """A run was asked to stop, and did after writing a checkpoint. The exit code is 128 + the signal's number."""

    def __init__(self, signum: int, words: str) -> None:
        super().__init__(words)
        self.signum, self.exit_code = signum, 128 + signum


class Stop:
    """Whether somebody asked this process to stop. A context manager: it listens while it is open.

    Only in the main thread, where Python can listen, and not to signals that are ignored (`nohup` ignores SIGHUP).

    Attributes:
        signum: the signal that came; None as long as none did.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._process = 0

    def __enter__(self) -> "Stop":
        self.signum, self._process = None, os.getpid()
        if threading.current_thread() is threading.main_thread():
            for one in SIGNALS:
                if signal.getsignal(one) not in (signal.SIG_IGN, None):
                    self._before[one] = signal.signal(one, self._heard)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that reads data: the step that is being finished needs it, and it ends with the run
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
        elif time.monotonic() - self._since >= SAME_WISH_SECONDS:
            self._restore()
            signal.raise_signal(signum)


class StopWithCheckpoint(TrainerCallback):
    """Ends a training after the step in which a stop was asked for, as soon as its checkpoint is written.

    An evaluation that is due at that step is made before, as in a run that goes on: a resumed run repeats no step, and
    would miss it.

    Args:
        stop: who listens.
        anywhere: a number of this process → its sum over all; of several processes all stop at the same step.
        together: waits until all processes are here.
    """

    def __init__(self, stop: Stop, anywhere: Callable[[float], float], together: Callable[[], None]) -> None:
        self.stop, self.anywhere, self.together = stop, anywhere, together
        self._is_asked = self._is_said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing was asked for yet."""
        self._is_asked = self._is_said = False

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says that the wish was heard; not where it is heard, in the middle of whatever runs."""
        self._say()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Has a checkpoint written; at the end of an epoch not here but behind what happens then."""
        self._say()
        self._is_asked = self.anywhere(float(self.stop.signum is not None)) > 0
        ends_epoch = state.epoch == int(state.epoch or 0) or control.should_training_stop
        if self._is_asked:
            control.should_save = not ends_epoch

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same, behind the last step of an epoch."""
        if self._is_asked:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The checkpoint is there: ends the run.

        Raises:
            StoppedError: always, if it was asked for.
        """
        if not self._is_asked:
            return
        self.together()
        signum = self.stop.signum or signal.SIGTERM  # another process was asked
        raise StoppedError(
            signum,
            f"stopped by {signal.Signals(signum).name} after step {state.global_step} of {state.max_steps}; all of it "
            f"is in {args.output_dir}/checkpoint-{state.global_step}. The same settings with output_dir: "
            f"{args.output_dir} go on from there, to the same result",
        )

    def _say(self) -> None:
        if self.stop.signum is not None and not self._is_said:
            self._is_said = True
            say("stopping", "this optimizer step is finished and a checkpoint written; a second signal ends at once")
