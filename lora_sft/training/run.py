"""A job → a trained model and its numbers, the adapter saved in the output folder."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from lora_sft.config import RunConfig, SourceSettings
from lora_sft.console import is_main_process, say
from lora_sft.errors import OutputError, RunError, SettingError
from lora_sft.model.adapter import attach, describe_trained, set_dtype
from lora_sft.model.base import grow_vocabulary, load_base, quantized_share
from lora_sft.model.device import peak_bytes
from lora_sft.model.loading import MANIFEST
from lora_sft.model.starts import start_from_rounding, start_from_rows
from lora_sft.model.tokenizer import teach_stop_tokens
from lora_sft.settings import read_file, resolve, to_yaml
from lora_sft.training.evaluation import batches
from lora_sft.training.job import Job
from lora_sft.training.output import METRICS, SETTINGS, OutputFolder
from lora_sft.training.progress import Listener, MetricsFile
from lora_sft.training.saving import Start, save_adapter
from lora_sft.training.trainer import Seen, Trainer, build_trainer, choose_batching

ROWS_FOR_START = 32
"""Conversations that the EVA start looks at."""

MAY_DIFFER = frozenset(
    {"output_dir", "resume_from_checkpoint", "logging_steps", "report_to", "save_strategy", "save_steps"}
    | {"save_total_limit", "eval_strategy", "eval_steps", "per_device_eval_batch_size"}
)
"""Settings that a resumed run may change without going another way."""


@dataclass(frozen=True)
class Outcome:
    """A finished training.

    Attributes:
        model: with its adapter, in eval mode.
        result: {"output_dir", "steps", "train_loss", "supervised_tokens", "tokens", "seconds", "peak_bytes", …},
            with "eval_loss" if there was an evaluation.
        metrics: the lines of `metrics.jsonl`.
    """

    model: Any
    result: dict[str, Any]
    metrics: list[dict[str, Any]]


def train(job: Job, folder: OutputFolder, given_model: Any, listeners: Sequence[Listener]) -> Outcome:
    """Trains, and saves the adapter in the output folder.

    Args:
        given_model: a model that was given loaded; None loads the base of the job.
        listeners: who follows the run, besides `metrics.jsonl`.

    Raises:
        OutputError: there is no checkpoint to resume from, or nothing left to train.
        SettingError: a resumed run was begun with other settings.
        RunError: out of memory, or the loss is not a number.
    """
    clock = time.perf_counter()
    checkpoint = find_checkpoint(job, folder)
    metrics = MetricsFile(folder.path / METRICS)
    everyone = [metrics, *listeners] if is_main_process() else []
    try:
        model = _model(job, given_model)
        say("trained", describe_trained(model))
        job = _settle_batches(job, model)
        _check_unfinished(job, checkpoint)
        with Start(model, job.config.start_changes_base) as start:
            held_out = job.evaluation.examples if job.evaluation else []
            trainer = build_trainer(
                model,
                job.speech,
                job.train.examples,
                held_out,
                job.config,
                job.arguments,
                everyone,
                job.train.examples.lengths,
                job.batching,
            )
            _begin(job, folder, trainer, metrics, checkpoint)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.count_seen()  # the steps after the last log
            model.eval()
            save_adapter(model, job, folder, start)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory on {job.spec.device}: halve per_device_train_batch_size and double "
            f"gradient_accumulation_steps, or lower max_length ({error})"
        ) from None
    finally:
        for listener in everyone:
            listener.ended()
    set_dtype(model, getattr(torch, job.spec.dtype))  # as a loaded adapter has them: no autocast is on any more
    if is_main_process():
        trainer.state.save_to_json(str(folder.path / "trainer_state.json"))
    return Outcome(model, _result(trainer, job, folder, metrics, time.perf_counter() - clock), metrics.lines)


def _begin(job: Job, folder: OutputFolder, trainer: Trainer, metrics: MetricsFile, checkpoint: Path | None) -> None:
    """Writes `run.yaml`; in a resumed run the totals go on from where the checkpoint was made."""
    folder.forget(MANIFEST)
    folder.write(SETTINGS, to_yaml(as_resolved(job), *_how_to_repeat(job)))
    if checkpoint is not None:
        last = metrics.last_until(step_of(checkpoint))
        supervised = int(last.get("num_supervised_tokens", 0))
        nll = last.get("train_loss", 0.0) * supervised
        trainer.seen = Seen(nll, supervised=supervised, tokens=int(last.get("num_tokens", 0)))


def as_resolved(job: Job) -> RunConfig:
    """The settings with what was chosen for the user, so that they give the same run on another machine too."""
    chosen = {
        "load_in_4bit": job.spec.quantization in ("nf4", "fp4"),
        "load_in_8bit": job.spec.quantization == "int8",
        "bf16": job.spec.dtype == "bfloat16",
        "fp16": job.spec.dtype == "float16",
        "device": job.spec.device.partition(":")[0],
        "gradient_checkpointing": bool(job.arguments.gradient_checkpointing),
        "resume_from_checkpoint": None,
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


def _model(job: Job, given_model: Any) -> Any:
    """The base with a fresh adapter."""
    model = load_base(job.spec) if given_model is None else given_model
    if job.spec.quantization is not None:
        kept = f"embeddings, output layer and fused experts stay in {job.spec.dtype}"
        say("base", f"{quantized_share(model):.0%} of the weights are in {job.spec.quantization}; {kept}")
    set_seed(job.config.seed)  # the rows of new tokens are drawn
    grow_vocabulary(model, len(job.speech.tokenizer))
    teach_stop_tokens(model, job.speech)
    model = attach(model, job.lora, job.config.seed)
    if job.config.lora_init == "eva":
        rows = job.train.examples[:ROWS_FOR_START]
        start_from_rows(model, batches(rows, 1, job.speech.tokenizer.pad_token_id, model.device))
    elif job.config.lora_init == "loftq":
        start_from_rounding(model, job.spec)
    return model


def find_checkpoint(job: Job, folder: OutputFolder) -> Path | None:
    """The checkpoint to resume from; None starts anew.

    Raises:
        OutputError: there is none, or the run is finished.
        SettingError: the run was begun with other settings.
    """
    wanted = job.config.resume_from_checkpoint
    if not wanted or str(wanted).lower() in ("false", "no"):
        return None
    if wanted is True or str(wanted).lower() in ("true", "yes", "auto", "last"):
        found = folder.last_checkpoint()
        if found is None:
            raise OutputError(
                f"resume_from_checkpoint: {folder.path} holds no checkpoint; leave the setting out to start anew"
            )
    else:
        found = Path(str(wanted)).expanduser()
        if not (found / "trainer_state.json").is_file():
            raise OutputError(f"resume_from_checkpoint: {found} is no checkpoint (no trainer_state.json in it)")
    if not job.batching.packing:  # else the model tells whether it can be packed, and so how many steps there are
        _check_unfinished(job, found)
    _check_settings(job, found.parent / SETTINGS)
    say("resume", f"from {found}")
    return found


def _check_unfinished(job: Job, checkpoint: Path | None) -> None:
    if checkpoint is not None and step_of(checkpoint) >= job.total_steps:
        where = f"{checkpoint} is at step {step_of(checkpoint)} of {job.total_steps}"
        raise OutputError(f"resume_from_checkpoint: {where}: finished")


def _settle_batches(job: Job, model: Any) -> Job:
    """The job with micro-batches that are right for this model: packed only where documents cannot see each other."""
    batching = choose_batching(model, job.config, job.arguments)
    if batching != job.batching:
        job = replace(job, batching=batching)
        job.begin_warmup()
    say("batches", job.plan.describe())
    return job


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _check_settings(job: Job, begun_with: Path) -> None:
    """A run that goes on with other settings would end as neither of the two."""
    if not begun_with.is_file():
        return
    before, now = resolve(read_file(begun_with)).model_dump(), as_resolved(job).model_dump()
    changed = [f"{name}: {before[name]} → {now[name]}" for name in now if before[name] != now[name]]
    changed = [words for words in changed if words.partition(":")[0] not in MAY_DIFFER]
    if changed:
        raise SettingError(f"the run was begun with other settings; {'; '.join(changed)}. Start another run for these")


def _how_to_repeat(job: Job) -> list[str]:
    notes = ["Every setting of this run. `lora-sft train THIS_FILE --output-dir ANOTHER_FOLDER` repeats it."]
    if job.config.dataset is None:
        notes.append("The conversations were given as objects in Python: name them again with --dataset.")
    if job.config.model_name_or_path is None:
        notes.append("The model was given loaded in Python: name it again with --model.")
    return notes


def _result(trainer: Trainer, job: Job, folder: OutputFolder, metrics: MetricsFile, seconds: float) -> dict[str, Any]:
    state = trainer.state
    losses = [line["loss"] for line in metrics.lines if "loss" in line]
    evaluations = {line["step"]: line["eval_loss"] for line in metrics.lines if "eval_loss" in line}
    result = {
        "output_dir": str(folder.path),
        "steps": state.global_step,
        "train_loss": trainer.seen.loss,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "supervised_tokens": trainer.seen.supervised,
        "tokens": trainer.seen.tokens,
        "seconds": round(seconds, 1),
        "peak_bytes": peak_bytes(job.spec.device),
    }
    if evaluations:
        kept = state.best_global_step if job.config.load_best_model_at_end else None
        result["eval_loss"] = evaluations.get(kept or max(evaluations), evaluations[max(evaluations)])
    return result
