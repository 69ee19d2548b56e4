"""A job → a trained model and its numbers, the adapter saved in the output folder."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_sft.console import is_main_process, say
from lora_sft.errors import OutputError, RunError
from lora_sft.kernels.swap import Swaps
from lora_sft.model.adapter import build_model, describe_trained, set_dtype
from lora_sft.model.base import load_base, quantized_share
from lora_sft.model.device import peak_bytes, resident_bytes
from lora_sft.model.fingerprint import hash_of_file
from lora_sft.model.loading import manifest_of, put_adapter
from lora_sft.model.starts import start_from_rounding, start_from_rows
from lora_sft.model.tokenizer import teach_stop_tokens
from lora_sft.settings import to_yaml
from lora_sft.training.batching import Batching
from lora_sft.training.checkpoints import STATE, set_aside, step_of
from lora_sft.training.evaluation import batches
from lora_sft.training.fast import Quickened, quicken
from lora_sft.training.going_on import Beginning, later_ones, refuse_past_end, where_to_begin
from lora_sft.training.job import Job
from lora_sft.training.output import METRICS, SETTINGS, START, OutputFolder
from lora_sft.training.progress import Listener, MetricsFile
from lora_sft.training.recompute import setting_of
from lora_sft.training.record import (
    Record,
    as_resolved,
    differences,
    fingerprint_of_base,
    record_of,
    refuse_changes,
)
from lora_sft.training.saving import Start, save_adapter
from lora_sft.training.state import WEIGHTS
from lora_sft.training.trainer import Trainer, build_trainer, choose_batching

ROWS_FOR_START = 32
"""Conversations that the EVA start looks at."""


class Ready(NamedTuple):
    """A run before its first step.

    Attributes:
        job: with micro-batches as they are made for this model.
        trainer: holds the model, which has its adapter and its fast parts.
        start: saves the adapter as the run will.
        folder: of the output.
        fast: what became of the fast parts; None where they are switched off.
    """

    job: Job
    trainer: Trainer
    start: Start
    folder: OutputFolder
    fast: Quickened | None


Preflight = Callable[[Ready], list[dict[str, Any]]]
"""Proves what has to hold before the first step → a record of each proof, as it is kept in `start.json`."""


@dataclass(frozen=True)
class Outcome:
    """A finished training.

    Attributes:
        model: with its adapter, in eval mode.
        result: {"output_dir", "steps", "train_loss", "supervised_tokens", "tokens", "seconds", "peak_bytes", …},
            with "eval_loss" if there was an evaluation, and "split_micro_batches" if some were computed in parts.
        metrics: the lines of `metrics.jsonl`.
        proofs: what was proven before the first step.
        recomputed: as `gradient_checkpointing` says what was done in the end; None for a run that was finished before.
        bytes_before: that the process held before the weights, where `peak_bytes` counts them too: on the CPU.
    """

    model: Any
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    proofs: list[dict[str, Any]] = field(default_factory=list)
    recomputed: bool | int | str | None = None
    bytes_before: int = 0


def train(
    job: Job,
    folder: OutputFolder,
    given_model: Any,
    listeners: Sequence[Listener],
    preflight: Preflight | None = None,
) -> Outcome:
    """Trains, and saves the adapter in the output folder; a run that is finished already is only loaded.

    Args:
        given_model: a model that was given loaded; None loads the base of the job.
        listeners: who follows the run, besides `metrics.jsonl`.
        preflight: called before the first step.

    Raises:
        OutputError: there is no checkpoint to resume from, or none that is whole.
        SettingError: a resumed run was begun with other settings or data.
        VerificationError: what `preflight` proves does not hold.
        RunError: out of memory, or the loss is not a number.
    """
    clock = time.perf_counter()
    now = record_of(job, given_model)
    beginning = where_to_begin(job, folder, now)
    if beginning.finished:
        return _as_finished(job, folder, given_model)
    metrics = MetricsFile(folder.path / METRICS)
    everyone = [metrics, *listeners] if is_main_process() else []
    bytes_before = resident_bytes() if job.spec.device == "cpu" else 0
    try:
        model = _model(job, given_model)
        say("trained", describe_trained(model))
        with Swaps() as swaps, Start(model, job.config.start_changes_base) as start:
            job, fast = _settle_batches(job, model, swaps)
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
                swaps,
            )
            is_at_its_end = refuse_past_end(job, beginning.checkpoint)
            proofs = _proofs_of_before(beginning, now)
            if proofs is None:
                ready = Ready(job, trainer, start, folder, fast)
                proofs = preflight(ready) if preflight is not None and not is_at_its_end else []
            _begin(job, folder, beginning, now | {"preflight": proofs})
            if beginning.checkpoint and is_at_its_end:
                trainer.take_up(beginning.checkpoint)
                for listener in everyone:
                    listener.started(job.total_steps, trainer.state.global_step)
            else:
                trainer.train(resume_from_checkpoint=str(beginning.checkpoint) if beginning.checkpoint else None)
            trainer.count_seen()  # the steps after the last log
            recomputed = setting_of(model)
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
    folder.fill(lambda staged: trainer.state.save_to_json(str(staged / STATE)))
    result = _result(trainer, job, folder, metrics, time.perf_counter() - clock)
    return Outcome(model, result, metrics.lines, proofs, recomputed, bytes_before)


def _proofs_of_before(beginning: Beginning, now: Record) -> list[dict[str, Any]] | None:
    """What was proven when the run was begun, if it goes on with the same things and versions."""
    before = beginning.before or {}
    proofs: list[dict[str, Any]] = before.get("preflight") or []
    if not proofs or before["versions"] != now["versions"] or differences(before, now):
        return None
    say("preflight", f"not made again: the run goes on with what its {len(proofs)} proofs were made on (start.json)")
    return proofs


def _begin(job: Job, folder: OutputFolder, beginning: Beginning, now: Record) -> None:
    """Writes `start.json` and `run.yaml`; in a resumed run the metrics up to the checkpoint are kept.

    Raises:
        SettingError: the base, which is downloaded only now, is another than when the run was begun.
    """
    if now["base"] is None:
        now = {**now, "base": fingerprint_of_base(job)}
        if beginning.before is not None:
            refuse_changes(beginning.before, now, job.config.resume_with_changed, folder.path)
    folder.write_json(START, now)
    folder.write(SETTINGS, to_yaml(as_resolved(job), *_how_to_repeat(job)))
    if is_main_process():
        for checkpoint in later_ones(folder, beginning.checkpoint):
            set_aside(checkpoint)
        if beginning.checkpoint is not None:
            lines = _lines_until(beginning.checkpoint.parent / METRICS, step_of(beginning.checkpoint))
            folder.write(METRICS, "".join(json.dumps(line) + "\n" for line in lines))


def _lines_until(file: Path, step: int) -> list[dict[str, Any]]:
    """The metrics up to a step; a line that was being written when the process died is left out."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if line["step"] <= step]


def _as_finished(job: Job, folder: OutputFolder, given_model: Any) -> Outcome:
    """What a finished run gave, loaded from its folder.

    Raises:
        OutputError: its adapter is not the one that was saved.
    """
    manifest = manifest_of(folder.path)
    recorded = manifest.get("adapter_sha256")
    if recorded and recorded != hash_of_file(folder.path / WEIGHTS):
        raise OutputError(f"{folder.path / WEIGHTS} was changed after the run; name another output_dir to train again")
    say("finished", f"{folder.path} holds this run already; nothing is trained")
    model = load_base(job.spec) if given_model is None else given_model
    model = put_adapter(model, folder.path, len(job.speech.tokenizer))
    teach_stop_tokens(model, job.speech)
    return Outcome(model.eval(), manifest["result"], _lines_until(folder.path / METRICS, sys.maxsize))


def _model(job: Job, given_model: Any) -> Any:
    """The base with a fresh adapter."""
    base = load_base(job.spec) if given_model is None else given_model
    if job.spec.quantization is not None:
        kept = f"embeddings, output layer and fused experts stay in {job.spec.dtype}"
        say("base", f"{quantized_share(base):.0%} of the weights are in {job.spec.quantization}; {kept}")
    teach_stop_tokens(base, job.speech)
    model = build_model(base, job.lora, job.config.seed, len(job.speech.tokenizer))
    if job.config.lora_init == "eva":
        rows = job.train.examples[:ROWS_FOR_START]
        start_from_rows(model, batches(rows, 1, job.speech.tokenizer.pad_token_id, model.device))
    elif job.config.lora_init == "loftq":
        start_from_rounding(model, job.spec)
    return model


def _settle_batches(job: Job, model: Any, swaps: Swaps) -> tuple[Job, Quickened | None]:
    """The job with micro-batches that are right for this model: end to end only where documents cannot see each other.

    The fast parts are put in, for what they know of documents counts; what became of them is the second value.
    """

    def settle() -> Batching:
        return choose_batching(model, job.config, job.arguments)

    fast = None
    if job.config.fast_kernels:
        autocast = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(job.spec.dtype)
        pad_token_id = job.speech.tokenizer.pad_token_id
        fast = quicken(model, job.train.examples, pad_token_id, settle, swaps, autocast)
    batching = settle() if fast is None else fast.batching
    planned = job.batching == batching
    job = replace(job, batching=batching)
    if not planned:
        job.begin_warmup()
    say("batches", job.plan.describe())
    return job, fast


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
    if trainer.split_micro_batches:
        result["split_micro_batches"] = trainer.split_micro_batches
    if evaluations:
        kept = state.best_global_step if job.config.load_best_model_at_end else None
        result["eval_loss"] = evaluations.get(kept or max(evaluations), evaluations[max(evaluations)])
    return result
