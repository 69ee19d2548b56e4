"""A blueprint and a device → the fastest settings that fit, with the batch of a step that was asked for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_sft.planning.devices import Device
from lora_sft.planning.plan import CANNOT, Plan, Rung, asked_recompute, batching_of, make_plan, usable_bytes
from lora_sft.planning.subject import Blueprint, Subject
from lora_sft.planning.trial import Recompute, Slopes, lays_end_to_end
from lora_sft.planning.workload import Workload, computed_tokens, mean_tokens

SMALLER_OPTIMIZER = "paged_adamw_8bit"
"""In which a quarter of the moments' memory is taken, and that from the host if need be."""

PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def choose_settings(blueprint: Blueprint, work: Workload, device: Device, measured: float | None = None) -> Plan:
    """Micro-batch × accumulation, recomputation, offload and, if nothing fits with the optimizer asked for, another.

    Packing stays as it was asked for: it changes how many conversations a step learns from. What is chosen by slopes is
    simulated whole, and the next one taken if it does not hold.

    Args:
        measured: as for `make_plan`.
    """
    try:
        rungs = _every_rung(blueprint, work, device)
    except CANNOT:
        return make_plan(blueprint, work, device, measured)  # which says why
    order = sorted(rungs, key=lambda rung: (not rung.fits, rung.seconds_per_step if rung.fits else rung.needed_bytes))
    for rung in order:
        chosen = _settings_of(blueprint, rung)
        ladder = [one._replace(chosen=one is rung) for one in rungs]
        plan = make_plan(chosen, work, device, measured, ladder)
        if plan.fits or not rung.fits:
            return plan
        rungs[rungs.index(rung)] = rung._replace(fits=False, needed_bytes=plan.peak.needed)
    return make_plan(_settings_of(blueprint, order[-1]), work, device, measured, rungs)


def _every_rung(blueprint: Blueprint, work: Workload, device: Device) -> list[Rung]:
    """What there is to choose from."""
    found: list[Rung] = []
    one_row = lays_end_to_end(blueprint, device)
    subjects: dict[int, Subject] = {}
    for optim in _optimizers(blueprint, device):
        found += _rungs(_with(blueprint, optim=optim), work, device, one_row, subjects)
        if any(rung.fits for rung in found):
            break
    return found


def _with(blueprint: Blueprint, **settings: Any) -> Blueprint:
    return replace(blueprint, config=blueprint.config.model_copy(update=settings))


def _settings_of(blueprint: Blueprint, rung: Rung) -> Blueprint:
    return _with(
        blueprint,
        per_device_train_batch_size=rung.micro_batch,
        gradient_accumulation_steps=rung.accumulation,
        gradient_checkpointing=rung.gradient_checkpointing,
        optim=rung.optim,
    )


def _optimizers(blueprint: Blueprint, device: Device) -> Sequence[str]:
    asked = blueprint.config.optim
    can_shrink = device.kind == "cuda" and asked in PLAIN_OPTIMIZERS
    return (asked, SMALLER_OPTIMIZER) if can_shrink else (asked,)


def _rungs(
    blueprint: Blueprint, work: Workload, device: Device, one_row: bool, subjects: dict[int, Subject]
) -> list[Rung]:
    """For each way to split the batch of a step, as little recomputation as it takes."""
    config = blueprint.config
    of_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    found = []
    for micro_batch in [size for size in range(of_step, 0, -1) if of_step % size == 0 and size <= len(work.lengths)]:
        accumulation = of_step // micro_batch
        plan = _with(blueprint, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation)
        batching = batching_of(plan, one_row)
        batch = work.largest(batching)
        slopes = Slopes(plan, device, batch, subjects=subjects)
        asked = config.gradient_checkpointing
        usable = usable_bytes(device)
        how = slopes.least(usable) if asked is None else asked_recompute(plan, device)
        taken = how or Recompute(plan.layers, offload=device.kind == "cuda")
        needed, pace = slopes.at(taken)
        share = mean_tokens(work.plan(batching)) / computed_tokens(batch)
        seconds = pace.micro_batch * share * accumulation + pace.update
        setting = taken.setting(plan.layers)
        found.append(Rung(micro_batch, accumulation, setting, config.optim, int(needed), seconds, needed <= usable))
        if how is not None and not taken.layers and micro_batch == of_step:
            break  # nothing is faster than the whole batch at once, and nothing computed twice
    return found
