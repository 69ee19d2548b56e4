"""What transformers' Trainer does with checkpoints, done so that a resumed training is the same to the bit.

transformers 5.23 writes them in place, with pickles and `training_args.bin` (which holds the hub token); it replaces a
missing optimizer file by a fresh optimizer, and removes whatever is called like a checkpoint. Remove this when its
checkpoints are sealed, verified and free of pickles.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer_callback import ExportableState

from lora_sft.errors import OutputError, RunError, SettingError
from lora_sft.training.checkpoints import (
    STATE,
    Checkpoints,
    checkpoint_of,
    checkpoints_in,
    looks_whole,
    step_of,
    what_is_wrong,
)
from lora_sft.training.state import read_state, read_weights, write_state, write_weights

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class Resuming(Base):
    """To be mixed into a trainer. Its totals are what `totals` and `take_totals` say.

    Attributes:
        checkpoints: writes them into the output folder.
    """

    checkpoints: Checkpoints
    optimizer: Any
    model: Any

    def prepare_checkpoints(self, keep: int | None, new_schedule: bool) -> None:
        """Called once, when the trainer is made.

        Args:
            keep: how many checkpoints are kept besides the best; None keeps all.
            new_schedule: whether a resumed run takes learning rate and the like from its settings; else it goes on with
                those that it was begun with.
        """
        if self.args.save_strategy != "no" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise SettingError("checkpoints of FSDP and DeepSpeed are not written; set save_strategy: no")
        self.checkpoints = Checkpoints(Path(str(self.args.output_dir)), keep)
        self._new_schedule = new_schedule
        self._saved: set[int] = set()
        self._process: dict[str, Any] = {}

    def totals(self) -> Any:
        """What the trainer has counted in this process, as plain data."""
        raise NotImplementedError

    def take_totals(self, totals: Any) -> None:
        """Goes on from what `totals` gave."""
        raise NotImplementedError

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Does not return, nor raise, before the last checkpoint is in its place."""
        with self._checkpoints_finished():
            return super().train(*args, **kwargs)

    @contextmanager
    def _checkpoints_finished(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.checkpoints.wait()

    # --- writing --------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint of this step, written by the main process; the others send it what only they have."""
        self.store_flos()
        step, best = self.state.global_step, self.state.best_global_step
        processes = gather_object([{"random": _generators(), "totals": self.totals()}])
        self._saved.add(step)
        if best in self._saved:
            self.state.best_model_checkpoint = str(checkpoint_of(self.checkpoints.folder, best))
        if self.args.should_save:
            self.checkpoints.save(step, best, lambda folder: self._write(folder, processes))

    def _write(self, folder: Path, processes: list[dict[str, Any]]) -> None:
        write_weights(folder, self.model)
        self.processing_class.save_pretrained(str(folder))
        scaler = getattr(self.accelerator, "scaler", None)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "processes": processes,
            "callbacks": {type(one).__name__: one.state()["attributes"] for one in self._stateful()},
            "stopped_early": self._stopped_early(),
        }
        write_state(folder, state)
        self.state.save_to_json(str(folder / STATE))

    def _stateful(self) -> list[Any]:
        return [one for one in self.callback_handler.callbacks if isinstance(one, ExportableState)]

    def _stopped_early(self) -> bool:
        """Whether the last evaluation was one too many without a better result."""
        return any(
            one.early_stopping_patience_counter >= one.early_stopping_patience
            for one in self._stateful()
            if isinstance(one, EarlyStoppingCallback)
        )

    # --- reading --------------------------------------------------------------------------------------

    def take_up(self, checkpoint: Path) -> None:
        """Model, state and totals of a training that ended with this checkpoint; nothing is left to train."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        self._take_process(read_state(checkpoint))
        self._find_saved(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Everything but the weights: optimizer, scheduler, scaler, totals, callbacks, and which steps were saved."""
        if checkpoint is None:
            return
        state = read_state(Path(checkpoint))
        self._load_optimizer(state)
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._take_process(state)
        for one in self._stateful():
            for name, value in state["callbacks"].get(type(one).__name__, {}).items():
                setattr(one, name, value)
        # transformers takes how often it logs and saves from the checkpoint too.
        self.state.compute_steps(self.args, self.state.max_steps)
        self._find_saved(Path(checkpoint))

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        scheduler: Any = self.lr_scheduler
        groups = [{name: deepcopy(group[name]) for name in group if name != "params"} for group in self._groups()]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise OutputError(f"resume_from_checkpoint: the optimizer in it is another than now: {error}") from None
        if not self._new_schedule:
            scheduler.load_state_dict(state["scheduler"])
            return
        if not isinstance(scheduler, LambdaLR):
            name = str(self.args.lr_scheduler_type)
            raise SettingError(f"resume_with_changed: lr_scheduler_type {name} cannot go on with changed settings")
        scheduler.last_epoch = state["scheduler"]["last_epoch"]
        for group, fresh, base, factor in zip(
            self._groups(), groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group.update(fresh)
            group["lr"] = base * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    def _take_process(self, state: Mapping[str, Any]) -> None:
        """Totals now; the random generators when the trainer asks for them."""
        processes = state["processes"]
        self._process = processes[self.args.process_index % len(processes)]
        self.take_totals(self._process["totals"])

    def _find_saved(self, checkpoint: Path) -> None:
        """Which steps were saved, so that the best of them can be had at the end."""
        whole = {step_of(one): one for one in checkpoints_in(checkpoint.parent) if looks_whole(one)}
        self._saved = set(whole)
        best = whole.get(self.state.best_global_step or -1)
        self.state.best_model_checkpoint = str(best) if best else None

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Done with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            _set_generators(self._process["random"])

    def _load_best_model(self) -> None:
        """The adapter of the best evaluation, instead of the last."""
        self.checkpoints.wait()
        self.accelerator.wait_for_everyone()
        best = Path(str(self.state.best_model_checkpoint))
        if wrong := what_is_wrong(best):
            raise RunError(f"the best adapter cannot be had: {wrong}; set load_best_model_at_end: false for the last")
        read_weights(best, self.model)


def _generators() -> dict[str, Any]:
    """The random generators of this process."""
    found = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _set_generators(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
