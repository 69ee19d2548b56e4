"""What a run is made of → `start.json`, and whether a run that goes on is still made of the same.

Data, base and template are compared by what is in them, not by their names: they may lie elsewhere than before.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_sft.config import RUN_PARTS, AdapterSettings, RunConfig, SourceSettings
from lora_sft.console import say
from lora_sft.errors import ModelError, SettingError
from lora_sft.model.fingerprint import fingerprint_of, fingerprint_of_loaded
from lora_sft.training.job import Job
from lora_sft.training.output import START
from lora_sft.training.saving import versions

Record = dict[str, Any]

MAY_DIFFER = frozenset(
    {"output_dir", "resume_from_checkpoint", "resume_with_changed", "logging_steps", "report_to", "export_to"}
    | {"save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps", "per_device_eval_batch_size"}
    | {"on_bad_row", "max_lost_share", "allow", "data_cache", "dataset_num_proc", "trust_remote_code"}
    | {"stop_when_diverging", "gradient_checkpointing", "preflight"}
)
"""Settings that a resumed run may change without going another way."""

SEEN_IN_THE_PARTS = frozenset(
    {"model_name_or_path", "model_revision", "dataset", "eval_dataset", "chat_template", "chat_template_dir"}
)
"""Names and places; what lies there is in `RUN_PARTS`."""

FIXED = frozenset(AdapterSettings.model_fields) - {"lora_dropout", "lora_alpha"} | {"optim", "loraplus_lr_ratio"}
"""Settings that make other tensors, which a checkpoint does not hold."""


def record_of(job: Job, given_model: Any = None) -> Record:
    """What a run is made of. `base` is None as long as a hub model is not downloaded.

    Args:
        given_model: a model that was given loaded, without its adapter.
    """
    return {
        "settings": as_resolved(job).model_dump(mode="json"),
        "data": job.data_hash,
        "evaluation_data": job.evaluation_hash,
        "base": fingerprint_of_base(job) if given_model is None else fingerprint_of_loaded(given_model),
        "chat_template": hashlib.sha256(str(job.speech.tokenizer.chat_template).encode()).hexdigest(),
        "stop_tokens": list(job.speech.stop_tokens),
        "processes": int(job.arguments.world_size),
        "versions": versions(),
    }


def fingerprint_of_base(job: Job) -> str | None:
    """None if its files are not here (yet)."""
    try:
        return fingerprint_of(job.spec)
    except ModelError:
        return None


def read_record(folder: Path) -> Record | None:
    """The record in a run's folder; None if there is none, or it cannot be read."""
    try:
        found = json.loads((folder / START).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("settings"), dict) else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """{name: `before → now`} of all that differs and matters."""
    ignored = {"base"} if None in (before.get("base"), now["base"]) else set()
    pairs = {name: (before.get(name), now[name]) for name in RUN_PARTS if name not in ignored}
    old, new = before["settings"], now["settings"]
    compared = (name for name in new if name in old and name not in MAY_DIFFER | SEEN_IN_THE_PARTS)
    pairs |= {name: (old[name], new[name]) for name in compared}
    return {name: f"{_short(one)} → {_short(other)}" for name, (one, other) in pairs.items() if one != other}


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], allowed: list[str], folder: Path) -> None:
    """Raises SettingError, field by field, if a run is made of other things than when it was begun.

    What `allowed` names may differ; it is said.
    """
    changed = differences(before, now)
    for name in [name for name in changed if name in allowed]:
        if name in FIXED:
            raise SettingError(f"resume_with_changed: {name} cannot change in a run; start another one for it")
        say("resume", f"with another {name}: {changed.pop(name)}")
    if changed:
        names = ", ".join(changed)
        raise SettingError(
            f"the run in {folder} was begun with other settings or data; "
            + "; ".join(f"{name}: {words}" for name, words in changed.items())
            + f". Name another output_dir, or accept it with resume_with_changed: [{names}]"
        )
    old = before.get("versions", {})
    others = [f"{name} {old[name]} → {new}" for name, new in now["versions"].items() if old.get(name, new) != new]
    if others:
        say("resume", f"with other versions, so the last bits may differ: {', '.join(others)}")


def _short(value: Any) -> str:
    """A value in words; of a hash its beginning."""
    words = str(value)
    is_hash = len(words) == 64 and set(words) <= set("0123456789abcdef")
    return f"{words[:12]}…" if is_hash else words


def as_resolved(job: Job) -> RunConfig:
    """The settings with what was chosen for the user, so that they give the same run on another machine too."""
    chosen = {
        "load_in_4bit": job.spec.quantization in ("nf4", "fp4"),
        "load_in_8bit": job.spec.quantization == "int8",
        "bf16": job.spec.dtype == "bfloat16",
        "fp16": job.spec.dtype == "float16",
        "device": job.spec.device.partition(":")[0],
        "resume_from_checkpoint": "auto",
        "resume_with_changed": [],
        "auto": False,
        "dataset": _from_anywhere(job.config.dataset),
        "eval_dataset": _from_anywhere(job.config.eval_dataset),
    }
    return job.config.model_copy(update=chosen)


def _from_anywhere(dataset: Any) -> Any:
    """Paths of data that hold in any folder; hub names stay what they are."""
    if isinstance(dataset, list):
        return [_from_anywhere(one) for one in dataset]
    if isinstance(dataset, SourceSettings):
        return dataset.model_copy(update={"path": _from_anywhere(dataset.path)})
    is_here = isinstance(dataset, str) and Path(dataset).expanduser().exists()
    return str(Path(dataset).expanduser().absolute()) if is_here else dataset
