"""A micro-batch that is out of memory → the same gradients from parts of it, and a run that goes on.

Out of memory is met where it can do least harm: the largest micro-batch and the largest evaluation batch are tried
before the first step. Where it comes later, the step is computed again, the micro-batch that did not fit in parts:

- Of two examples or more, in halves, these in halves again, each divided by the supervised tokens of the whole step.
- Of one example, all layers are recomputed in the backward pass.
- If they are already, the run ends.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_sft.chat.labels import Example
from lora_sft.config import RunConfig
from lora_sft.console import warn
from lora_sft.errors import RunError
from lora_sft.kernels.swap import Swaps
from lora_sft.training.batching import Batching, Lengths, computed_tokens, halve, plan_batches
from lora_sft.training.recompute import bytes_of_first_step, largest_of, recompute_all
from lora_sft.training.shortage import can_be_caught, let_go
from lora_sft.training.tally import Tally
from lora_sft.training.watch import MicroBatch, Watch, random_state, set_random_state

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

Part = list[Example]


def parts_of(examples: Sequence[Example], batching: Batching, limit: float) -> list[Part]:
    """Examples, halved and halved again until fewer than `limit` tokens are computed for each part, or it is one."""
    sizes = [len(example.input_ids) for example in examples]
    if len(examples) < 2 or computed_tokens(sizes, batching) < limit:
        return [list(examples)]
    cut = halve(sizes, batching)
    return [part for half in (examples[:cut], examples[cut:]) for part in parts_of(half, batching, limit)]


class Splitting(Base):
    """To be mixed into a trainer, between what keeps its micro-batches in `watch` and what trains on them.

    Attributes:
        split_micro_batches: how many were computed in parts.
        share: of the tokens of its micro-batch, what is being computed; for a loss that is no sum over them.
    """

    model: Any
    optimizer: Any
    watch: Watch | None
    split_micro_batches = 0
    share = 1.0
    _config: RunConfig
    _swaps: Swaps
    _tally: Tally
    _examples: Sequence[Example]
    _lengths: Lengths
    _limit = math.inf
    """Tokens of the smallest micro-batch that was out of memory: as many are not tried again."""
    _is_told = False
    _error = ""
    _before: Tally
    _ways: list[list[Part] | None]
    """The parts in which each micro-batch of the running step is computed; None: as it came."""

    @property
    def batching_now(self) -> Batching:
        """How micro-batches are made."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Examples → the tensors of a micro-batch."""
        raise NotImplementedError

    def rows_of(self, batch: MicroBatch) -> dict[int, Example]:
        """{number in the training data: example} of a micro-batch that was kept."""
        raise NotImplementedError

    def loss_of(self, inputs: Mapping[str, Any], token_count: Any) -> Tensor:
        """The loss of tensors, as in training but uncounted."""
        raise NotImplementedError

    def try_evaluation(self) -> None:
        """Runs the largest evaluation batch."""
        raise NotImplementedError

    # --- a step ---------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch, its gradients added to those of its step; what it is out of memory for is computed in parts.

        A backward pass that failed may have added part of its gradients. So all of the step are dropped, and its
        micro-batches are computed again from their own random state, to the same gradients; nothing is counted twice.
        Parts draw their dropout anew. The mean of a router's auxiliary loss is taken over the parts, which is not quite
        that of the whole.

        Raises:
            RunError: one example is too large even if all layers are recomputed.
            torch.OutOfMemoryError: several processes train together: the others would wait.
        """
        if self.watch is None:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        batch = self.watch.batches[-1]
        if batch.number == 0:
            self._ways, self._before = [], copy(self._tally)
        self._ways.append(self._way_of(batch))
        self.split_micro_batches += self._ways[-1] is not None
        found = self._run(model, batch)
        while found is None:
            found = self._run_step_again(model, self.watch)
        return found

    def _way_of(self, batch: MicroBatch) -> list[Part] | None:
        """None if it is smaller than whatever was out of memory; else its parts."""
        if batch.inputs["input_ids"].numel() < self._limit:
            return None
        parts = parts_of(self._examples_of(batch), self.batching_now, self._limit)
        return parts if len(parts) > 1 else None

    def _examples_of(self, batch: MicroBatch) -> Part:
        """What a micro-batch that was kept was made of.

        Raises:
            torch.OutOfMemoryError: it is not known: `ignore_data_skip` changes the order behind our back.
        """
        examples, ids = [*self.rows_of(batch).values()], batch.inputs["input_ids"]
        if not torch.equal(self.collate(examples)["input_ids"], ids.cpu()):
            raise torch.OutOfMemoryError(f"{self._error} The rows of the micro-batch are not known")
        return examples

    def _run(self, model: Any, batch: MicroBatch) -> Tensor | None:
        """The loss of a micro-batch, its gradients added. None: out of memory; the way is now another one."""
        way = self._ways[batch.number]
        if way is None:
            loss = self._attempt(model, batch.inputs, batch.token_count)
            if loss is None:
                self._go_another_way(batch, self._examples_of(batch))
            return loss
        losses = []
        tokens = sum(len(example.input_ids) for part in way for example in part)
        for part in way:
            share = sum(len(example.input_ids) for example in part) / tokens
            loss = self._attempt(model, self.collate(part), batch.token_count, share)
            if loss is None:
                self._go_another_way(batch, part)
                return None
            losses.append(loss)
        if self.watch is not None:
            self.watch.join(len(losses))
        return torch.stack(losses).sum()

    def _attempt(self, model: Any, inputs: Any, token_count: Any, share: float = 1.0) -> Tensor | None:
        """One pass forward and backward → its loss, None if it is out of memory. Nobody holds the error any more."""
        self.share = share
        try:
            loss: Tensor = super().training_step(model, inputs, token_count)
        except torch.OutOfMemoryError as error:
            if token_count is None or not self._may_try_again():
                raise
            self._error = str(error)
            return None
        finally:
            self.share = 1.0
        return loss

    def _may_try_again(self) -> bool:
        """Not where other processes wait, nor where weights may have been changed within the backward pass."""
        return self.accelerator.num_processes == 1 and not self._steps_in_backward()

    def _steps_in_backward(self) -> bool:
        optimizer = str(self.args.optim).lower()
        return bool(self.is_deepspeed_enabled) or "lomo" in optimizer or "layerwise" in optimizer

    def _go_another_way(self, batch: MicroBatch, failed: Part) -> None:
        """Called when a part of a micro-batch, or all of it, was out of memory."""
        before = self._ways[batch.number]
        self._make_room(failed, f"step {batch.step + 1}")
        parts = [smaller for part in before or [failed] for smaller in parts_of(part, self.batching_now, self._limit)]
        self._ways[batch.number] = parts if len(parts) > 1 else None
        self.split_micro_batches += (self._ways[batch.number] is not None) - (before is not None)

    def _run_step_again(self, model: Any, watch: Watch) -> Tensor | None:
        """The loss of the last micro-batch of the step so far, with the gradients of all. None: as for `_run`."""
        watch.begin_again()
        self._tally = copy(self._before)
        loss = None
        for batch in watch.batches:
            set_random_state(batch.random, self.model.device)
            loss = self._run(model, batch)
            if loss is None:
                break
        return loss

    def _make_room(self, failed: Part, when: str, recompute_first: bool = False) -> None:
        """Decides what is done about examples that were out of memory together, and says it. The gradients are dropped.

        Raises:
            RunError: there is nothing left to do.
        """
        device = self.model.device
        self.model.zero_grad(set_to_none=True)
        let_go(device)
        computed = computed_tokens([len(example.input_ids) for example in failed], self.batching_now)
        is_one = len(failed) == 1
        if (is_one or recompute_first) and recompute_all(self.model, self._swaps):
            self._limit = math.inf  # of what was out of memory, much fits now
            what = "one example" if is_one else "a micro-batch"
            warn(
                f"{when}: {what} of {computed:,} tokens is out of memory on {device}; from now on all layers are "
                "recomputed in the backward pass, which gives the same gradients"
            )
            return
        if is_one:
            raise RunError(
                f"out of memory on {device}: one example of {computed:,} tokens does not fit, though all layers are "
                f"recomputed; lower max_length, or take a smaller optimizer (optim: paged_adamw_8bit) ({self._error})"
            )
        self._limit = min(self._limit, computed)
        if not self._is_told:
            self._is_told = True
            warn(
                f"{when}: a micro-batch of {computed:,} tokens is out of memory on {device}; from now on those that "
                "are as large are computed in parts, which gives the same gradients"
            )

    def loss_of_kept(self, batch: MicroBatch, token_count: Any) -> Tensor:
        """As `loss_of`, of a micro-batch that was kept; in parts where it is as large as one that was out of memory."""
        way = self._way_of(batch)
        if way is None:
            return self.loss_of(batch.inputs, token_count)
        count = max(1, len(batch.inputs["targets"])) if token_count is None else token_count
        return torch.stack([self.loss_of(self.collate(part), count) for part in way]).sum()

    # --- before the first step ------------------------------------------------------------------------

    def try_largest(self) -> None:
        """Runs the largest micro-batch forward and backward, and the largest evaluation batch, so that being out of
        memory shows before anything was trained. Weights, counts and random generators are left as they were.

        On the CPU nothing is run: being out of memory ends the process there, early or late.

        Raises:
            RunError, torch.OutOfMemoryError: as for `training_step`.
        """
        if not can_be_caught(self.model.device) or self._steps_in_backward() or self.is_fsdp_enabled:
            return
        was_training, random = self.model.training, random_state(self.model.device)
        try:
            self._try_training()
            self.try_evaluation()
        finally:
            self.model.train(was_training)
            set_random_state(random, self.model.device)

    def _try_training(self) -> None:
        plan = plan_batches(self._lengths, self.batching_now)
        largest = largest_of(plan, self._lengths)
        first = plan.batches[self.args.process_index]
        if self.state.global_step == 0 and self._computed(first) >= self._computed(largest):
            return  # the first step tries it
        when = f"before step {self.state.global_step + 1}"
        parts: list[Part] = [[self._examples[index] for index in largest]]
        while parts:
            if self._passes(parts[0]):
                parts = parts[1:]
            else:
                self._make_room(parts[0], when, self._config.gradient_checkpointing is None)
                parts = [smaller for part in parts for smaller in parts_of(part, self.batching_now, self._limit)]

    def _computed(self, rows: Sequence[int]) -> int:
        return computed_tokens([int(self._lengths[row]) for row in rows], self.batching_now)

    def _passes(self, part: Part) -> bool:
        """Whether there is memory for a pass forward and backward, beside gradients and moments as a later step has
        them."""
        to_come = bytes_of_first_step(self.model) // (3 if self.optimizer.state else 1)  # a third are the gradients
        try:
            _held = torch.empty(to_come, dtype=torch.uint8, device=self.model.device)
            self.loss_of(self.collate(part), None).backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError as error:
            if not self._may_try_again():
                raise
            self._error = str(error)
            return False
        finally:
            self.model.zero_grad(set_to_none=True)
        return True


class LargestFirst(TrainerCallback):
    """Tries what is largest when a training begins, be it a resumed one."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights are sound and a checkpoint is read, if there is one."""
        self.run()
