"""A run that is prepared → the settings that its plan chooses, and the peak that is foretold for its record."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_sft.console import say
from lora_sft.planning.devices import Device, this_machine
from lora_sft.planning.plan import Plan, make_plan
from lora_sft.planning.search import choose_settings
from lora_sft.planning.subject import blueprint_of_job
from lora_sft.planning.workload import Workload
from lora_sft.training.going_on import agreed
from lora_sft.training.job import Job, with_settings
from lora_sft.training.recompute import gib
from lora_sft.training.run import Outcome

CHOSEN = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "optim")
"""What `auto` chooses."""


def choose(job: Job, before: Mapping[str, Any] | None, given_model: Any = None) -> tuple[Job, Plan | None]:
    """What `auto` asks for: the job with the settings of its plan, the same in all processes.

    Args:
        before: what the run was made of when it was begun; its settings are kept, whatever fits now.
    """
    if before is not None:
        kept = {name: before["settings"][name] for name in CHOSEN if name in before["settings"]}
        say("auto", "as when the run was begun: " + ", ".join(f"{name} {value}" for name, value in kept.items()))
        return with_settings(job, **kept), None
    plan: Plan = agreed(lambda: choose_settings(*_planned(job, given_model, measures=True)))
    return with_settings(job, **{name: plan.settings[name] for name in CHOSEN}), plan


def foretell(job: Job, recomputed: Any, given_model: Any = None) -> Plan:
    """The plan of a run whose settings are all known; its seconds mean nothing.

    Args:
        recomputed: as `gradient_checkpointing` says what the run does.
    """
    job = replace(job, config=job.config.model_copy(update={"gradient_checkpointing": recomputed}))
    return make_plan(*_planned(job, given_model, measures=False))


def memory_of(job: Job, outcome: Outcome, given_model: Any = None) -> dict[str, Any]:
    """The peak that was foretold beside the one that was measured, for the manifest."""
    on_cpu = job.spec.device == "cpu"
    found: dict[str, Any] = {
        "measured_bytes": max(0, outcome.result["peak_bytes"] - outcome.bytes_before),
        "measured_as": "resident memory since the weights, libraries and files included"
        if on_cpu
        else "torch.cuda.max_memory_allocated",
    }
    if not job.config.preflight or outcome.recomputed is None:
        return found
    try:
        foretold = foretell(job, outcome.recomputed, given_model)
    except Exception as error:  # the run is trained and saved: whatever a model's own code may raise does not undo it
        return found | {"not_foretold": f"{type(error).__name__}: {str(error)[:200]}"}
    peak = foretold.peak
    return found | {"foretold_bytes": peak.allocated, "certainty": foretold.certainty, "parts": dict(peak.parts)}


def verdict(plan: Plan) -> str:
    """One line: whether it fits."""
    fits = "fits" if plan.fits else "does not fit"
    return f"{fits}: needs {gib(plan.peak.needed)} of {gib(plan.device.bytes)} ({plan.device.name})"


def _planned(job: Job, given_model: Any, measures: bool) -> tuple[Any, Workload, Device]:
    kind = "cpu" if job.spec.device == "cpu" else "cuda"
    return blueprint_of_job(job, given_model), Workload.of_data(job, job.speech), this_machine(kind, measures)
