"""A trained model → the files of the output folder: adapter, tokenizer, and the record of how it came about."""

import hashlib
import importlib.metadata
import platform
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_sft.model.base import quantization_record
from lora_sft.model.device import device_name
from lora_sft.model.fingerprint import hash_of_file
from lora_sft.model.foreign import base_record, hash_of_settings
from lora_sft.training.job import Job
from lora_sft.training.output import OutputFolder
from lora_sft.training.state import WEIGHTS

PACKAGES = (
    "lora_sft",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
)


class Start:
    """The adapter before training, kept while a start that changes the base weights (PiSSA, OLoRA) is trained.

    With it the trained adapter is saved as a plain LoRA on the unchanged base, which every server reads.
    """

    def __init__(self, model: Any, changes_base: bool) -> None:
        self._folder = tempfile.TemporaryDirectory() if changes_base else None
        if self._folder:
            settings = model.peft_config["default"]
            start, settings.init_lora_weights = settings.init_lora_weights, True
            model.save_pretrained(self._folder.name)
            settings.init_lora_weights = start

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder:
            self._folder.cleanup()

    def save(self, model: Any, folder: Path) -> None:
        """Writes `adapter_model.safetensors` and `adapter_config.json`."""
        options: dict[str, Any] = {"save_embedding_layers": False}
        if self._folder:
            options["path_initial_model_for_weight_conversion"] = self._folder.name
        with warnings.catch_warnings():
            # PEFT loads the start beside the trained adapter to subtract it, and warns that it does.
            warnings.filterwarnings("ignore", message=".*changes the base weights of the model")
            model.save_pretrained(folder, **options)


def save_adapter(model: Any, job: Job, folder: OutputFolder, start: Start) -> None:
    """Adapter, tokenizer, chat template and generation config, in the form that any PEFT user can load."""
    settings = model.peft_config["default"]
    settings.revision = commit_of(model) or job.spec.revision
    settings.base_model_name_or_path = job.spec.name

    def write(staged: Path) -> None:
        start.save(model, staged)
        job.speech.tokenizer.save_pretrained(staged)
        model.get_base_model().generation_config.save_pretrained(staged)
        (staged / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours follows

    folder.fill(write)


def make_manifest(model: Any, job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """The record of a run: where everything came from, what came out, with what it was made."""
    data = job.train
    return {
        "base": {
            **asdict(job.spec),
            "commit": commit_of(model),
            "config_sha256": _sha256(model.config.to_json_string()),
            "fingerprint": base_record(job.spec),
        },
        "quantization": quantization_record(model),
        "data": {
            "sha256": job.data_hash,
            "examples": len(data.examples),
            "tokens": data.tokens,
            "supervised_tokens": data.supervised_tokens,
            "dropped_too_long": len(data.too_long),
            "dropped_without_reply": len(data.without_reply),
            "cut": data.cut,
            "tokens_cut": data.tokens_cut,
            "tokens_dropped": data.tokens_dropped,
            "rows": job.intake.rows,
            "bad_rows": job.intake.grave,
            "duplicates": job.intake.duplicates,
            "replies": data.replies,
            "split_tokens": data.split,
            "noted": data.noted,
            "evaluation_examples": len(job.evaluation.examples) if job.evaluation else 0,
        },
        "chat_template_kwargs": job.config.chat_template_kwargs,
        "replies": {name: getattr(job.config, name) for name in ("turns", "append_stop_token", "allow")},
        "chat_template_sha256": _sha256(str(job.speech.tokenizer.chat_template)),
        "stop_tokens": job.speech.stop_tokens,
        "adapter_settings_sha256": hash_of_settings(Path(str(job.config.output_dir))),
        "adapter_sha256": hash_of_file(Path(str(job.config.output_dir)) / WEIGHTS),
        "result": result,
        "versions": versions(),
        "hardware": {
            "device": device_name(job.spec.device),
            "cpu_threads": torch.get_num_threads(),
            "platform": platform.platform(),
        },
    }


def versions() -> dict[str, str | None]:
    """Of Python and the packages that training depends on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def commit_of(model: Any) -> str | None:
    """The commit of a hub model; None for a model from a folder."""
    return getattr(model.config, "_commit_hash", None)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
