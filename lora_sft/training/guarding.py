"""What a trainer does besides training, so that nothing is lost or silently wrong: it is watched, it can be stopped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor

from lora_sft.chat.labels import Example
from lora_sft.config import RunConfig
from lora_sft.console import say, warn
from lora_sft.errors import RunError
from lora_sft.kernels.swap import Swaps
from lora_sft.training.batching import Batching, Lengths, plan_batches
from lora_sft.training.loss import forward_loss
from lora_sft.training.modules import Look, first_bad, look_behind_modules
from lora_sft.training.replay import FAILURE, Failure, describe, write_failure
from lora_sft.training.signals import Stop, StopWithCheckpoint
from lora_sft.training.splitting import LargestFirst
from lora_sft.training.watch import ADVICE, Fault, MicroBatch, Watch, random_state, set_random_state

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

TOKENS = "tokens"
"""Entry of a micro-batch: how many tokens it has besides padding. It is for the count, not for the model."""


class Guarding(Base):
    """To be mixed into a trainer, before `Splitting`. It needs its `_examples`, `_lengths` and `_batching`."""

    model: Any
    watch: Watch | None = None
    loss_of_kept: Callable[[MicroBatch, Any], Tensor]
    try_largest: Callable[[], None]
    label_smoothing: float
    _examples: Sequence[Example]
    _lengths: Lengths
    _batching: Batching

    def guard(self, config: RunConfig, swaps: Swaps) -> None:
        """Called once, when the trainer is made and has its other callbacks: ours look at what those decide.

        Args:
            swaps: undone before a failure is looked at, module by module, as a replay of it does later.
        """
        self._config, self._stop, self._swaps = config, Stop(), swaps
        self._plan_of = lru_cache(maxsize=2)(partial(plan_batches, self._lengths))  # the first epoch's, and the last
        self.watch = Watch(
            self.model,
            self.model.config.get_text_config().vocab_size,
            config.stop_when_diverging,
            self.loss_of_kept,
            self.over_all,
            self._scale,
            self.end_with_failure,
        )
        self.add_callback(StopWithCheckpoint(self._stop, self._asked, self.accelerator.wait_for_everyone))
        self.add_callback(self.watch)
        self.add_callback(LargestFirst(self.try_largest))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Listens to signals while it trains."""
        with self._stop:
            result = super().train(*args, **kwargs)
        if self._stop.signum is not None:
            say("stopping", "not any more: the last step was done when the signal came, and the result is saved")
        return result

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch; it is kept until its step is known to be sound."""
        if self.watch is not None:
            self.watch.keep(self.state.global_step, inputs, num_items_in_batch)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _prepare_input(self, data: Any) -> Any:
        """To the device, without waiting: transformers' own (5.23) waits there for the micro-batch before, once a
        tensor."""
        if isinstance(data, Tensor) and self.args.device.type == "cuda" and not self.is_deepspeed_enabled:
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """The supervised tokens of a step, counted where the labels lie, and brought to the device without waiting."""
        if self.args.world_size > 1 or device.type != "cuda":
            return super()._get_num_items_in_batch(batch_samples, device)
        count = super()._get_num_items_in_batch(batch_samples, torch.device("cpu"))
        return count.to(device, non_blocking=True) if isinstance(count, Tensor) else count

    def loss_of(self, inputs: Mapping[str, Any], token_count: Any) -> Tensor:
        """The loss of a micro-batch, as in training but uncounted; this process alone."""
        batch = self._prepare_inputs({name: value for name, value in inputs.items() if name != TOKENS})
        self.model.train()
        with self.compute_loss_context_manager():
            loss, _ = forward_loss(self.model, batch, token_count, self.label_smoothing)
        return loss.value

    def over_all(self, *sums: float) -> Sequence[float]:
        """Sums of this process → sums of all of them; one alone waits for no device."""
        return sums if self.accelerator.num_processes == 1 else self._over_all_ranks(*sums)

    def _over_all_ranks(self, *sums: Tensor | float) -> list[float]:
        raise NotImplementedError

    def _asked(self, here: float) -> float:
        return self.over_all(here)[0]

    def _scale(self) -> float | None:
        scaler = getattr(self.accelerator, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())

    @property
    def batching_now(self) -> Batching:
        """How micro-batches are made."""
        # `_train_batch_size` is smaller than the setting where auto_find_batch_size has halved it.
        return replace(self._batching, micro_batch=self._train_batch_size)

    def rows_of(self, batch: MicroBatch) -> dict[int, Example]:
        """{number in the training data: example} of a micro-batch, in its order."""
        batching, in_a_step = self.batching_now, self.args.gradient_accumulation_steps
        epoch, step = divmod(batch.step, self._plan_of(batching, 0).steps_of_an_epoch(in_a_step))
        mine = self._plan_of(batching, epoch).batches[self.args.process_index :: batching.ranks]
        return {index: self._examples[index] for index in mine[step * in_a_step + batch.number]}

    def end_with_failure(self, fault: Fault, batches: Sequence[MicroBatch]) -> NoReturn:
        """Runs the micro-batches again to find the module, keeps the guilty one in `failure/`, and ends the run.

        Args:
            batches: of the step; none before the first one.

        Raises:
            RunError: always.
        """
        self._swaps.undo()
        batch, loss, looks = self._find(fault, batches or [self._first_batch()])
        failure = self._describe(fault, batch, loss, looks)
        output = Path(str(self.args.output_dir))
        is_here = fault.batch is not None or first_bad(looks) is not None
        words: list[str] = gather_object([failure.in_words() if is_here else ""])
        guilty = next((process for process, some in enumerate(words) if some), 0)
        if guilty == self.args.process_index:
            try:
                write_failure(output, failure, batch, self.model, self._config)
            except OSError as error:
                warn(f"{output / FAILURE}: cannot be written: {error}")
        self.accelerator.wait_for_everyone()
        where = words[guilty] or failure.in_words()
        raise RunError(
            f"{fault.words}: {where}. The run ended with step {failure.after_step}; nothing was written since the last "
            f"checkpoint. Next: {ADVICE[fault.kind]}. `lora-sft replay {output}` shows the micro-batch module by "
            f"module, from {output / FAILURE}"
        )

    def _find(self, fault: Fault, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, float, list[Look]]:
        """The first micro-batch that gives NaN or Inf when it is run again; else the one that the fault names."""
        named = batches[fault.batch or 0]
        found = (named, 0.0, list[Look]())
        for batch in [named] if fault.batch is not None else batches:
            set_random_state(batch.random, self.model.device)
            try:
                loss, looks = look_behind_modules(
                    self.model,
                    lambda batch=batch: self.loss_of(batch.inputs, batch.token_count) * (self._scale() or 1.0),  # type: ignore[misc]
                )
            except torch.OutOfMemoryError:
                continue  # it was computed in parts, or with recomputation; it can still be named
            if batch is named or first_bad(looks):
                found = batch, loss / (self._scale() or 1.0), looks
            if first_bad(looks):
                break
        return found

    def _describe(self, fault: Fault, batch: MicroBatch, loss: float, looks: Sequence[Look]) -> Failure:
        mixed = str(self.accelerator.mixed_precision)
        return describe(
            fault,
            batch,
            loss,
            looks,
            self.rows_of(batch),
            after_step=self.state.global_step,
            process=int(self.args.process_index),
            autocast={"bf16": "bfloat16", "fp16": "float16"}.get(mixed),
            scale=self._scale() or 1.0,
            vocabulary_size=len(self.processing_class),
            device=str(self.model.device),
        )

    def _first_batch(self) -> MicroBatch:
        """The micro-batch that comes next, of a run that takes no step."""
        inputs = next(iter(self.get_train_dataloader()))
        return MicroBatch(self.state.global_step, 0, inputs, None, random_state(self.model.device))
