"""A trainer and a few rows → the gradients of steps that are not taken: trainer and model are left as they were."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.modules.dropout import _DropoutNd

from lora_sft.chat import IGNORED
from lora_sft.chat.labels import Example
from lora_sft.kernels.swap import Swaps, left_as_it_was
from lora_sft.training.fast import Distance, Measured, compare, filled, take_gradients
from lora_sft.training.loader import Collator
from lora_sft.training.tally import Seen
from lora_sft.training.trainer import Trainer


class Step(NamedTuple):
    """One optimizer step, up to its gradients.

    Attributes:
        whole: all rows in one micro-batch.
        parts: each row in a micro-batch of its own.
        training: whether in training mode; else without dropout, and without recomputation.
    """

    whole: Measured
    parts: Measured
    training: bool

    @property
    def distance(self) -> Distance:
        """Between the two ways, which should be none."""
        return compare(self.whole, self.parts)


class Rehearsal:
    """Steps without an optimizer. The trainer itself counts, divides and differentiates."""

    def __init__(self, trainer: Trainer, collate: Collator, rows: Sequence[Example]) -> None:
        self.trainer, self.collate, self.rows = trainer, collate, rows

    def step(self, training: bool | None = None) -> Step:
        """A step in both ways.

        Args:
            training: as in `Step`; None: unless the model draws numbers then, by which two passes would differ.
        """
        training = not draws(self.trainer.model) if training is None else training
        with _mode(self.trainer.model, training):
            return Step(self._measure([self.rows]), self._measure([[row] for row in self.rows]), training)

    def noise(self, step: Step) -> Distance:
        """What a row beside the others, in which nothing is learned, does to the step by rounding."""
        tokens = [token for row in self.rows for token in row.input_ids]
        idle = Example(tokens, [IGNORED] * len(tokens))
        with _mode(self.trainer.model, step.training):
            return compare(step.whole, self._measure([[*self.rows, idle]]))

    def _measure(self, micro_batches: Sequence[Sequence[Example]]) -> Measured:
        trainer, batches = self.trainer, [self.collate(some) for some in micro_batches]
        batches, count = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        losses = [trainer.training_step(trainer.model, batch, count) for batch in batches]
        return Measured(float(torch.stack(losses).sum()), take_gradients(trainer.model))


@contextmanager
def rehearsing(trainer: Trainer) -> Iterator[None]:
    """Within, the trainer computes as it will once it trains, its adapter filled, but nothing is watched or counted."""
    watch, scaler, has_router_loss = trainer.watch, trainer.accelerator.scaler, trainer.aux_loss_enabled
    trainer.watch, trainer.accelerator.scaler = None, None  # float16: a first scale overflows, and is found by trying
    trainer.aux_loss_enabled = False  # a router's balance over a micro-batch is no sum over its rows
    forward = trainer.model.forward

    def in_autocast(*args: Any, **kwargs: Any) -> Any:
        with trainer.accelerator.autocast():  # accelerate puts the model into it when the training begins
            return forward(*args, **kwargs)

    try:
        with left_as_it_was(trainer.model), filled(trainer.model), torch.enable_grad(), Swaps() as swaps:
            swaps.forward(trainer.model, in_autocast)
            yield
    finally:
        take_gradients(trainer.model)
        trainer.watch, trainer.accelerator.scaler, trainer.aux_loss_enabled = watch, scaler, has_router_loss
        trainer.take_totals({"seen": list(Seen()), "tally": {}})


@contextmanager
def _mode(model: Any, training: bool) -> Iterator[None]:
    """The model in a mode that stays: the trainer's step would switch dropout on."""
    model.train(training)
    model.train = lambda mode=True: model
    try:
        yield
    finally:
        del model.train


def draws(model: Any) -> bool:
    """Whether a model may draw random numbers in training mode."""
    dropouts = (module for module in model.modules() if isinstance(module, _DropoutNd))
    settings = model.config.get_text_config().to_dict()
    numbers = (value for name, value in settings.items() if re.search("drop|jitter|noise", name))
    return any(one.p > 0 for one in dropouts) or any(isinstance(value, float) and value > 0 for value in numbers)
