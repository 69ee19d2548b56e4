"""Blueprint, workload and device → the plan of a run: does it fit, what takes the memory, how long does it take."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from packaging.version import Version

from lora_sft.model.outline import outline
from lora_sft.planning.account import Peak
from lora_sft.planning.devices import Device
from lora_sft.planning.formula import estimate
from lora_sft.planning.pace import UNSURE, UNSURE_MEASURED
from lora_sft.planning.subject import Blueprint, subject_of
from lora_sft.planning.trial import Recompute, Slopes, Trial, try_step
from lora_sft.planning.workload import Workload, mean_tokens
from lora_sft.training.batching import Batching

CHECKED_WITH = {"torch": "2.13", "transformers": "5.23", "peft": "0.21", "bitsandbytes": "0.50"}
"""Versions whose ways of computing were compared with the allocator's record."""

CANNOT = (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError, LookupError)
"""What a model's code may raise on tensors without storage."""

MARGIN = 0.02
"""Of the memory of a GPU, kept free in the verdict: no plan for CUDA was checked on a device yet."""


class Rung(NamedTuple):
    """One way that was looked at.

    Attributes:
        micro_batch, accumulation: their product is the batch of a step.
        gradient_checkpointing, optim: the settings.
        needed_bytes: of the device.
        seconds_per_step: of an optimizer step.
        fits, chosen: whether it does, and whether it was taken.
    """

    micro_batch: int
    accumulation: int
    gradient_checkpointing: bool | int | str
    optim: str
    needed_bytes: int
    seconds_per_step: float
    fits: bool
    chosen: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        device: that it was planned for.
        fits: whether the device has the memory.
        peak: of a step with the largest micro-batch.
        settings: those that decide it, as they would be written in a settings file.
        steps: optimizer steps of the run, and of an epoch.
        seconds_per_step: of an optimizer step, on average.
        unsure: share by which the seconds may be off.
        certainty: `simulated`, or `uncertain` with the reason in `assumptions`.
        disk_bytes: {"adapter and checkpoints", "merged model"}.
        host_bytes: memory of the host that the run needs for what is kept there.
        ladder: what was looked at, if settings were chosen.
        assumptions: what the numbers rest on, in sentences.
    """

    device: Device
    fits: bool
    peak: Peak
    settings: Mapping[str, Any]
    steps: int
    steps_per_epoch: int
    seconds_per_step: float
    unsure: float
    certainty: str
    disk_bytes: Mapping[str, int]
    host_bytes: int
    ladder: Sequence[Rung]
    assumptions: Sequence[str]

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.steps * self.seconds_per_step

    def to_json(self) -> dict[str, Any]:
        """As `lora-sft plan --json` prints it."""
        low, high = 1 - self.unsure, 1 + self.unsure
        return {
            "fits": self.fits,
            "certainty": self.certainty,
            "device": self.device.name,
            "capacity_bytes": self.device.bytes,
            "peak_bytes": self.peak.allocated,
            "reserved_bytes": self.peak.reserved,
            "needed_bytes": self.peak.needed,
            "breakdown": dict(self.peak.parts),
            "peak_operation": self.peak.operation,
            "settings": dict(self.settings),
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "seconds_per_step": self.seconds_per_step,
            "seconds_per_step_range": [low * self.seconds_per_step, high * self.seconds_per_step],
            "seconds_per_epoch": self.steps_per_epoch * self.seconds_per_step,
            "seconds": self.seconds,
            "disk_bytes": dict(self.disk_bytes),
            "host_bytes": self.host_bytes,
            "ladder": [rung._asdict() for rung in self.ladder],
            "assumptions": list(self.assumptions),
        }


def make_plan(
    blueprint: Blueprint,
    work: Workload,
    device: Device,
    measured: float | None = None,
    ladder: Sequence[Rung] = (),
) -> Plan:
    """Simulates a step with the largest micro-batch, and says what comes of it.

    With `gradient_checkpointing` unset, as few layers are recomputed as it takes to fit.

    Args:
        measured: seconds that steps really took over those that were foretold; None: none were measured.
        ladder: what was looked at before.
    """
    config, usable = blueprint.config, usable_bytes(device)
    look = _look(blueprint, work, device, usable)
    doubts = [*_doubts(blueprint), *_unknown_versions()]
    plan = work.plan(look.batching)
    per_epoch = plan.steps_of_an_epoch(config.gradient_accumulation_steps)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    seconds = seconds_of_step(look.trial, mean_tokens(plan), config.gradient_accumulation_steps)
    return Plan(
        device,
        look.trial.peak.needed <= usable,
        look.trial.peak,
        _settings(blueprint, look.batching, look.how),
        steps,
        per_epoch,
        seconds * (measured or 1.0),
        UNSURE if measured is None else UNSURE_MEASURED,
        "simulated" if look.is_simulated and not doubts else "uncertain",
        disk_bytes(blueprint, look.trial),
        look.trial.host_bytes,
        ladder,
        [work.described, *look.notes, *doubts, *_about_device(device, measured), *_about_settings(blueprint)],
    )


class _Look(NamedTuple):
    """A step that was looked at, how it was made, and what is to be said of it."""

    trial: Trial
    batching: Batching
    how: Recompute
    is_simulated: bool
    notes: list[str]


def _look(plan: Blueprint, work: Workload, device: Device, usable: int) -> _Look:
    """A step by simulation; by a formula where the model's code asks for what only its weights can answer."""
    try:
        return _simulated(plan, work, device, usable)
    except CANNOT as error:
        batching, how = batching_of(plan, False), asked_recompute(plan, device) or Recompute(plan.layers)
        words = str(error).partition("\n")[0][:200]
        note = f"this model cannot be simulated ({type(error).__name__}: {words}); a formula was used instead"
        return _Look(estimate(plan, device, work.largest(batching), how), batching, how, False, [note])


def _simulated(plan: Blueprint, work: Workload, device: Device, usable: int) -> _Look:
    subject, evaluation = subject_of(plan, device), _evaluation(plan, work)
    asked = asked_recompute(plan, device)
    how, one_row = asked or Recompute(), subject.one_row
    batching = batching_of(plan, one_row)
    batch = work.largest(batching)
    try:
        trial = try_step(plan, device, batch, how, evaluation, subject)
    except CANNOT:
        if not one_row:
            raise
        one_row, batching = False, batching_of(plan, False)  # such as recurrent layers that refuse packed rows
        batch = work.largest(batching)
        trial = try_step(plan, device, batch, how, evaluation, subject)
    if asked is None and trial.peak.needed > usable:
        least = Slopes(plan, device, batch, evaluation, {plan.layers: subject}).least(usable)
        how = least or Recompute(plan.layers)
        trial = try_step(plan, device, batch, how, evaluation, subject)
        while trial.peak.needed > usable and how.layers < plan.layers:
            how = Recompute(how.layers + 1)
            trial = try_step(plan, device, batch, how, evaluation, subject)
    return _Look(trial, batching, how, True, _about_batches(one_row, plan.config.packing))


def usable_bytes(device: Device) -> int:
    """What a plan may need of a device."""
    return int(device.bytes * (1 - MARGIN)) if device.kind == "cuda" else device.bytes


def batching_of(plan: Blueprint, one_row: bool) -> Batching:
    """How a run would make micro-batches if its documents are proven to stay apart."""
    batching = Batching.of(plan.config)
    is_alone = batching.packing and batching.micro_batch == 1
    return replace(batching, one_row=one_row or is_alone)


def seconds_of_step(trial: Trial, mean: float, accumulation: int) -> float:
    """Of an optimizer step whose micro-batches have so many tokens on average."""
    return trial.pace.micro_batch * mean / trial.tokens * accumulation + trial.pace.update


def disk_bytes(plan: Blueprint, trial: Trial) -> dict[str, int]:
    """What a run and its merge write; with each checkpoint the adapter and two moments in float32."""
    config, adapter = plan.config, trial.peak.parts.get("adapter", 0)
    kept = 0 if config.save_strategy == "no" else (config.save_total_limit or 10) + 1
    whole = replace(plan.spec, quantization=None, double_quant=False)
    merged = sum(one.numel() * one.element_size() for one in outline(plan.shape, whole).parameters())
    return {"adapter and checkpoints": adapter * (1 + 3 * kept), "merged model": merged}


def _evaluation(plan: Blueprint, work: Workload) -> dict[str, Any] | None:
    return work.largest_evaluation(plan.config.per_device_eval_batch_size or plan.config.per_device_train_batch_size)


def asked_recompute(plan: Blueprint, device: Device) -> Recompute | None:
    """What `gradient_checkpointing` asks for; None if it is unset."""
    asked, layers = plan.config.gradient_checkpointing, plan.layers
    if asked is None:
        return None
    if asked == "offload":
        return Recompute(layers, offload=device.kind == "cuda")
    if asked == "selective":
        return Recompute(-(-layers // 2))
    return Recompute(layers if asked is True else min(int(asked), layers))


def _settings(plan: Blueprint, batching: Batching, how: Recompute) -> dict[str, Any]:
    config, spec = plan.config, plan.spec
    return {
        "model_name_or_path": spec.name,
        "load_in_4bit": spec.quantization in ("nf4", "fp4"),
        "load_in_8bit": spec.quantization == "int8",
        "bf16": spec.dtype == "bfloat16",
        "fp16": spec.dtype == "float16",
        "lora_r": config.lora_r,
        "max_length": config.max_length,
        "packing": batching.packing,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_checkpointing": how.setting(plan.layers),
        "optim": config.optim,
    }


def _about_batches(one_row: bool, packing: bool) -> list[str]:
    if one_row:
        return ["examples are laid end to end, without padding; a run proves on the model that they stay apart"]
    if packing:
        return ["packing is taken for granted; a run proves on the model that documents stay apart, or pads"]
    return []


def _about_device(device: Device, measured: float | None) -> list[str]:
    notes = []
    if device.kind == "cuda":
        notes.append(
            "memory on CUDA was checked on the CPU only: kernels' buffers, cuBLAS workspaces and the allocator's "
            f"rounding come from the sources of PyTorch; {MARGIN:.0%} of the memory are kept free for it"
        )
        notes.append("norms and gated MLPs are computed by our own kernels; with liger-kernel installed they take less")
    if measured is not None:
        notes.append(f"seconds: {measured:.2f} times those of the roofline, as ten real steps took")
    else:
        rates = "as published" if not device.is_here else "as measured here"
        notes.append(f"seconds: from counted operations and bytes, the device's rates {rates}; ±{UNSURE:.0%}")
    return notes


def _about_settings(plan: Blueprint) -> list[str]:
    notes = []
    if plan.spec.quantization == "int8":
        notes.append("8 bits: as if no activations were outliers, whose columns are computed in 16 bits")
    if plan.config.lora_init in ("eva", "loftq") or plan.config.start_needs_whole_base:
        notes.append(f"what lora_init {plan.config.lora_init} needs before the first step is not counted")
    if plan.config.neftune_noise_alpha:
        notes.append("the noise of neftune_noise_alpha is not counted: a tensor as large as the embeddings' output")
    return notes


def _doubts(plan: Blueprint) -> list[str]:
    """Why numbers of this run are uncertain."""
    notes = []
    if plan.spec.quantization == "int8":
        notes.append("uncertain: what bitsandbytes' 8-bit kernels take for themselves is known in part")
    if plan.spec.trust_remote_code:
        notes.append("uncertain: the model's own code is simulated as it stands, and was never compared")
    return notes


def _unknown_versions() -> list[str]:
    found = {name: Version(importlib.metadata.version(name)) for name in CHECKED_WITH}
    others = [
        f"{name} {version}"
        for name, version in found.items()
        if (version.major, version.minor) != (Version(CHECKED_WITH[name]).major, Version(CHECKED_WITH[name]).minor)
    ]
    if not others:
        return []
    return [f"uncertain: {', '.join(others)} was not compared with its simulation ({CHECKED_WITH} were)"]
