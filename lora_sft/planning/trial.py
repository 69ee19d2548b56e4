"""A blueprint, a micro-batch and a device → the memory and the time of a step, for one way to recompute layers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lora_sft.planning.account import Peak, peak_of
from lora_sft.planning.devices import CONTEXT_BYTES, Device
from lora_sft.planning.optimizer import Optimizer
from lora_sft.planning.pace import Pace, pace_of
from lora_sft.planning.step import Batch, simulate
from lora_sft.planning.subject import Blueprint, Subject, subject_of
from lora_sft.planning.workload import computed_tokens

UNUSED = 1.03
"""Reserved over allocated bytes, where only shallow models were simulated: their gaps are not those of a deep one."""


@dataclass(frozen=True)
class Recompute:
    """How many of the first layers are recomputed, and whether their inputs are kept on the host."""

    layers: int = 0
    offload: bool = False

    def setting(self, of: int) -> Any:
        """As `gradient_checkpointing` says it, for a model of so many layers."""
        if self.offload:
            return "offload"
        return {0: False, of: True}.get(self.layers, self.layers)


class Trial(NamedTuple):
    """One simulated step.

    Attributes:
        peak: its memory.
        pace: its time.
        tokens: that are computed in the micro-batch, padding included.
        host_bytes: kept on the host: inputs of layers, and states of paged optimizers.
    """

    peak: Peak
    pace: Pace
    tokens: int
    host_bytes: int


def try_step(
    plan: Blueprint,
    device: Device,
    batch: Batch,
    how: Recompute = Recompute(),
    evaluation: Batch | None = None,
    subject: Subject | None = None,
) -> Trial:
    """Simulates a step of the largest micro-batch.

    Args:
        subject: of this blueprint, if it was made before.
    """
    config, dtype = plan.config, getattr(torch, plan.spec.dtype)
    optimizer = Optimizer(config)
    found = simulate(
        (subject or subject_of(plan, device)).model,
        batch,
        optimizer,
        device,
        dtype,
        how.layers,
        how.offload,
        config.gradient_accumulation_steps > 1,
        config.label_smoothing,
        evaluation,
    )
    tokens = computed_tokens(batch)
    inputs = tokens * int(plan.shape.get_text_config().hidden_size) * dtype.itemsize
    away = inputs * max(how.layers - 1, 0) if how.offload else 0
    return Trial(peak_of(found, device), pace_of(found, device), tokens, optimizer.host_bytes + away)


def lays_end_to_end(plan: Blueprint, device: Device) -> bool:
    """Whether the attention of a model can compute examples that are laid end to end in one row."""
    return subject_of(plan.with_layers(min(plan.layers, plan.period)), device).one_row


class Slopes:
    """Memory and time of a step as functions of layers, from a few simulated steps of shallow models.

    Layers that repeat take the same each; only the first differs, whose input needs no gradient, and full
    recomputation, at whose peak the last layer is computed again. What is chosen so is simulated whole in the end.
    """

    def __init__(
        self,
        plan: Blueprint,
        device: Device,
        batch: Batch,
        evaluation: Batch | None = None,
        subjects: dict[int, Subject] | None = None,
    ) -> None:
        """`subjects` keeps the models that are made, by their layers, for plans that differ in no shape of them."""
        self.plan, self.device, self.batch, self.evaluation = plan, device, batch, evaluation
        self._subjects = {} if subjects is None else subjects
        self.layers, self._some = plan.layers, plan.period
        self._is_shallow = self.layers > 5 * self._some
        self._known: dict[tuple[int, int, bool], Trial] = {}

    def at(self, how: Recompute) -> tuple[float, Pace]:
        """(bytes needed of the device, pace) of the whole model; what the allocator keeps beside is guessed."""
        if not self._is_shallow:
            trial = self._try(self.layers, how.layers, how.offload)
            return trial.peak.needed, trial.pace
        some, deep = self._some, 4 * self._some
        is_full = how.layers >= self.layers
        first = self._try(deep - some, deep - some if is_full else 0, how.offload)
        second = self._try(deep, deep if is_full else 0, how.offload)
        found = self._line(second, first, (self.layers - deep) / some)
        if how.layers and not is_full:
            one, two = self._try(deep, some, False), self._try(deep, 2 * some, False)
            saved = self._line(two, one, how.layers / some - 2)
            found = tuple(a + b - c for a, b, c in zip(found, saved, _numbers(second), strict=True))  # type: ignore[assignment]
        on_gpu = self.device.kind == "cuda"
        return found[0] * UNUSED + CONTEXT_BYTES if on_gpu else found[0], Pace(found[1], found[2])

    def least(self, free: int) -> Recompute | None:
        """The fewest layers that have to be recomputed to need at most so many bytes; None: even all do not suffice."""
        if self.at(Recompute())[0] <= free:
            return Recompute()
        low, high = 0, self.layers
        while high - low > 1:  # low does not fit, high may
            middle = (low + high) // 2
            low, high = (low, middle) if self.at(Recompute(middle))[0] <= free else (middle, high)
        if self.at(Recompute(high))[0] <= free:
            return Recompute(high)
        if high < self.layers and self.at(Recompute(self.layers))[0] <= free:
            return Recompute(self.layers)
        away = Recompute(self.layers, offload=True)
        return away if self.device.kind == "cuda" and self.at(away)[0] <= free else None

    def _line(self, second: Trial, first: Trial, times: float) -> tuple[float, float, float]:
        """The second, and so many times what it has more than the first."""
        pairs = zip(_numbers(second), _numbers(first), strict=True)
        a, b, c = (one + times * (one - other) for one, other in pairs)
        return a, b, c

    def _try(self, layers: int, recomputed: int, offload: bool) -> Trial:
        key = layers, recomputed, offload
        if key not in self._known:
            plan = self.plan if layers == self.layers else self.plan.with_layers(layers)
            if layers not in self._subjects:
                self._subjects[layers] = subject_of(plan, self.device)
            how, subject = Recompute(recomputed, offload), self._subjects[layers]
            self._known[key] = try_step(plan, self.device, self.batch, how, self.evaluation, subject)
        return self._known[key]


def _numbers(trial: Trial) -> tuple[float, float, float]:
    return trial.peak.allocated, trial.pace.micro_batch, trial.pace.update
