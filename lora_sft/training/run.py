"""A job → a trained model and its numbers, the adapter saved in the output folder."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from lora_sft.console import is_main_process, say
from lora_sft.errors import OutputError, RunError
from lora_sft.model.adapter import attach, describe_trained
from lora_sft.model.base import load_base
from lora_sft.model.starts import start_from_rounding, start_from_rows
from lora_sft.model.tokenizer import teach_stop_tokens
from lora_sft.settings import to_yaml
from lora_sft.training.evaluation import batches
from lora_sft.training.job import Job
from lora_sft.training.output import METRICS, SETTINGS, OutputFolder
from lora_sft.training.progress import Listener, MetricsFile
from lora_sft.training.saving import Start, peak_bytes, save_adapter
from lora_sft.training.trainer import Trainer, build_trainer

ROWS_FOR_START = 32
"""Conversations that the EVA start looks at."""


def train(
    job: Job, folder: OutputFolder, given_model: Any, listeners: Sequence[Listener]
) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    """Trains, saves the adapter, and returns (model, result, metrics).

    Args:
        given_model: a model that was given loaded; None loads the base of the job.
        listeners: who follows the run, besides `metrics.jsonl`.

    Returns:
        The model with its adapter in eval mode, and {"output_dir", "steps", "train_loss", "supervised_tokens",
        "tokens", "seconds", "peak_bytes"}, with "eval_loss" if there was an evaluation;
        and the lines of `metrics.jsonl`.

    Raises:
        OutputError: there is no checkpoint to resume from.
        RunError: out of memory, or the loss is not a number.
    """
    clock = time.perf_counter()
    checkpoint = _checkpoint(job, folder)
    repeat = job.config.model_copy(update={"resume_from_checkpoint": None})
    folder.write(SETTINGS, to_yaml(repeat, *_how_to_repeat(job)))
    model = _model(job, given_model)
    say("trained", describe_trained(model))

    metrics = MetricsFile(folder.path / METRICS)
    everyone = [metrics, *listeners] if is_main_process() else []
    held_out = job.evaluation.examples if job.evaluation else []
    with Start(model, job.config.start_changes_base) as start:
        trainer = build_trainer(model, job.speech, job.train.examples, held_out, job.config, job.arguments, everyone)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"out of memory on {job.spec.device}: halve per_device_train_batch_size and double "
                f"gradient_accumulation_steps, or lower max_length ({error})"
            ) from None
        finally:
            for listener in everyone:
                listener.ended()
        model.eval()
        save_adapter(model, job, folder, start)
    if is_main_process():
        trainer.state.save_to_json(str(folder.path / "trainer_state.json"))
    return model, _result(trainer, job, folder, metrics, time.perf_counter() - clock), metrics.lines


def _model(job: Job, given_model: Any) -> Any:
    """The base with a fresh adapter."""
    model = load_base(job.spec) if given_model is None else given_model
    set_seed(job.config.seed)  # the rows of new tokens are drawn
    if len(job.speech.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(job.speech.tokenizer))
    teach_stop_tokens(model, job.speech)
    model = attach(model, job.lora, job.config.seed)
    if job.config.lora_init == "eva":
        start_from_rows(
            model, batches(job.train.examples[:ROWS_FOR_START], 1, job.speech.tokenizer.pad_token_id, model.device)
        )
    elif job.config.lora_init == "loftq":
        start_from_rounding(model, job.spec)
    return model


def _checkpoint(job: Job, folder: OutputFolder) -> str | None:
    """The folder to resume from."""
    wanted = job.config.resume_from_checkpoint
    if not wanted:
        return None
    if wanted is True or str(wanted).lower() in ("true", "auto", "last"):
        found = folder.last_checkpoint()
        if found is None:
            raise OutputError(
                f"resume_from_checkpoint: {folder.path} holds no checkpoint; leave the setting out to start anew"
            )
    else:
        found = Path(str(wanted)).expanduser()
        if not (found / "trainer_state.json").is_file():
            raise OutputError(f"resume_from_checkpoint: {found} is no checkpoint (no trainer_state.json in it)")
    say("resume", f"from {found}")
    return str(found)


def _how_to_repeat(job: Job) -> list[str]:
    notes = ["Every setting of this run. `lora-sft train THIS_FILE --output-dir ANOTHER_FOLDER` repeats it."]
    if job.config.dataset is None:
        notes.append("The conversations were given as objects in Python: name them again with --dataset.")
    if job.config.model_name_or_path is None:
        notes.append("The model was given loaded in Python: name it again with --model.")
    return notes


def _result(trainer: Trainer, job: Job, folder: OutputFolder, metrics: MetricsFile, seconds: float) -> dict[str, Any]:
    trainer.count_seen()  # the steps after the last log
    evaluations = [line["eval_loss"] for line in metrics.lines if "eval_loss" in line]
    losses = [line["loss"] for line in metrics.lines if "loss" in line]
    result = {
        "output_dir": str(folder.path),
        "steps": trainer.state.global_step,
        "train_loss": trainer.nll_seen / max(trainer.supervised_tokens_seen, 1),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "supervised_tokens": trainer.supervised_tokens_seen,
        "tokens": trainer.tokens_seen,
        "seconds": round(seconds, 1),
        "peak_bytes": peak_bytes(job.spec.device),
    }
    if evaluations:
        result["eval_loss"] = min(evaluations) if job.config.load_best_model_at_end else evaluations[-1]
    return result
