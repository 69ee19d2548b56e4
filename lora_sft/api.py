"""The public verbs. Each one orchestrates stages and decides nothing itself."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sft.chat.check import Finding, check_template
from lora_sft.chat.labels import Preview, look_at
from lora_sft.chat.probe import guess_stop_token
from lora_sft.chat.stops import stop_tokens_of
from lora_sft.chat.templates import find_template, shipped_templates
from lora_sft.config import RunConfig
from lora_sft.console import console, is_main_process, say
from lora_sft.data.conversation import Message
from lora_sft.data.intake import Intake
from lora_sft.errors import DataError, RunError, SettingError
from lora_sft.exporting.export import export as export  # is public here
from lora_sft.exporting.export import refuse_exports
from lora_sft.exporting.targets import refuse_unknown
from lora_sft.merging.merge import merge
from lora_sft.model.disk import full_disk_told
from lora_sft.model.generation import reply
from lora_sft.model.loading import MANIFEST, load_model
from lora_sft.model.tiny import tokenizer_for
from lora_sft.model.tokenizer import prepare_speech
from lora_sft.planning.calibration import calibrate as measured_steps
from lora_sft.planning.devices import find_device
from lora_sft.planning.foretell import choose, memory_of, verdict
from lora_sft.planning.plan import Plan, make_plan
from lora_sft.planning.search import choose_settings
from lora_sft.planning.subject import blueprint_of
from lora_sft.planning.table import Table, make_table
from lora_sft.planning.workload import Workload
from lora_sft.preflight import preflight
from lora_sft.preparation.dataset import conversations_of, read_data, sources_of
from lora_sft.preparation.prepare import prepare, render_conversation
from lora_sft.preparation.validation import Report, validate_conversations
from lora_sft.publishing.card import model_card
from lora_sft.report.page import report_page
from lora_sft.report.plan_view import ladder_view
from lora_sft.report.progress import LiveDisplay
from lora_sft.report.views import data_view
from lora_sft.settings import read_file, resolve
from lora_sft.training.evaluation import measure
from lora_sft.training.job import check_positions, load_speech, make_job
from lora_sft.training.output import OutputFolder
from lora_sft.training.progress import Listener
from lora_sft.training.record import read_record
from lora_sft.training.run import train
from lora_sft.training.saving import make_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Chat:
    """A model that can be talked to.

    Attributes:
        model: of transformers, or a PeftModel.
        tokenizer: with the chat template that was trained.
        template_variables: those that the chat template was given in training; a call may override them.
    """

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    template_variables: Mapping[str, Any]

    def chat(self, message: str | Sequence[Message], **options: Any) -> str:
        """The reply to a message of the user, or to a whole conversation; `options` are those of `generation.reply`."""
        messages = [{"role": "user", "content": message}] if isinstance(message, str) else list(message)
        return reply(self.model, self.tokenizer, messages, **{**self.template_variables, **options})


@dataclass(frozen=True)
class Run(Chat):
    """A finished training run.

    Attributes:
        output_dir: the adapter folder.
        metrics: {"steps", "train_loss", "supervised_tokens", "tokens", "seconds", "peak_bytes", …}.
    """

    output_dir: Path
    metrics: dict[str, Any]

    def merge(self, output: str | Path, **options: Any) -> dict[str, Any]:
        """Merges the adapter into its base; as `lora_sft.merge`."""
        return merge(self.output_dir, output, **options)

    def export(self, target: str, output: str | Path | None = None, **options: Any) -> dict[str, Any]:
        """Writes the adapter in the form that a server wants; as `lora_sft.export`."""
        return export(self.output_dir, target, output, **options)


@contextmanager
def _what_is_loaded_left_alone() -> Iterator[None]:
    """The garbage collector does not go through what is in memory already, mostly code: 0.3 s each time."""
    was_left_alone = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not was_left_alone:
            gc.unfreeze()


@_what_is_loaded_left_alone()
def finetune(
    model: "str | Path | PreTrainedModel | None" = None,
    dataset: Any = None,
    *,
    eval_dataset: Any = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    config: "RunConfig | str | Path | Mapping[str, Any] | None" = None,
    listeners: Sequence[Listener] | None = None,
    **settings: Any,
) -> Run:
    """Trains a LoRA adapter on conversations.

    Args:
        model: a folder, a hub name, or a loaded model (then give its tokenizer too, if it does not lie with it).
        dataset: a path, a hub name, a list of dicts, or a `datasets` object.
        eval_dataset: likewise; evaluated during training.
        tokenizer: instead of the one that lies with the model.
        config: settings as a RunConfig, a mapping, or a YAML file; `settings` win over it.
        listeners: who follows the run; None shows it on the console.
        settings: any setting, by its name in `RunConfig`.

    Raises:
        UsageError: something that was given is wrong; nothing was started.
        VerificationError: what has to hold before the first step does not; nothing was trained.
        RunError: the training failed.
    """
    resolved, objects = _settings(config, settings, model, dataset, eval_dataset)
    refuse_unknown(resolved.export_to)
    folder = OutputFolder(resolved.output_dir, resume=bool(resolved.resume_from_checkpoint))
    try:
        job = make_job(resolved.model_copy(update={"output_dir": str(folder.path)}), **objects, tokenizer=tokenizer)
        refuse_exports(job, objects["model"])
        folder.check_room(job.output_bytes)
        if job.config.auto:
            job, chosen = choose(job, read_record(folder.path) if folder.begun else None, objects["model"])
            if chosen is not None:
                console().print(ladder_view(chosen.ladder))
                say("plan", verdict(chosen))
        if job.intake.bad and is_main_process():
            folder.write("bad_rows.jsonl", job.intake.bad_rows())
        console().print(data_view(job))
        followers = [LiveDisplay()] if listeners is None else listeners
        with full_disk_told(folder.path, job.output_bytes, f"output_dir {folder.path}", RunError):
            outcome = train(job, folder, objects["model"], followers, preflight if job.config.preflight else None)
            if is_main_process():
                manifest = make_manifest(outcome.model, job, outcome.result) | {"preflight": outcome.proofs}
                manifest["memory"] = memory_of(job, outcome, objects["model"])
                folder.write("README.md", model_card(manifest, job.config, folder.path.name, outcome.metrics))
                folder.write("report.html", report_page(job, manifest, outcome.metrics, folder.path.name))
                folder.write_json(MANIFEST, manifest)  # last: its presence says that the run is finished
    finally:
        folder.release()
    variables = job.config.chat_template_kwargs
    return Run(outcome.model, job.speech.tokenizer, variables, folder.path, outcome.result)


def _settings(
    config: Any, settings: dict[str, Any], model: Any, dataset: Any, eval_dataset: Any
) -> tuple[RunConfig, dict[str, Any]]:
    """Names go into the settings; what was given as an object goes beside them."""
    layers: list[Mapping[str, Any]] = []
    if isinstance(config, RunConfig):
        layers.append(config.model_dump())
    elif config is not None:
        layers.append(read_file(config) if isinstance(config, (str, Path)) else config)
    objects: dict[str, Any] = {}
    for name, setting, value in (
        ("model", "model_name_or_path", model),
        ("dataset", "dataset", dataset),
        ("eval_dataset", "eval_dataset", eval_dataset),
    ):
        if isinstance(value, (str, Path)):
            settings = {**settings, setting: str(value)}
        objects[name] = None if isinstance(value, (str, Path)) else value
    return resolve(*layers, settings), objects


def load(path: str | Path, device: str = "auto", trust_remote_code: bool = False) -> Chat:
    """A model to talk to: an adapter folder (on its base, as trained), a merged model, or any chat model.

    Raises:
        ModelError: there is none.
    """
    loaded = load_model(path, device, trust_remote_code)
    return Chat(loaded.model, loaded.tokenizer, loaded.template_variables)


def evaluate(
    path: str | Path,
    dataset: Any,
    *,
    max_length: int = 2048,
    batch_size: int = 8,
    split: str = "train",
    device: str = "auto",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    layout: str | None = None,
    columns: Mapping[str, str] | str | None = None,
    roles: Mapping[str, str] | str | None = None,
    **template_variables: Any,
) -> dict[str, Any]:
    """Loss, perplexity and token accuracy on the replies of a dataset; of an adapter's base too, for comparison.

    Which replies count, and how they end, is what the adapter's training was told (`turns`, `append_stop_token`).

    Args:
        path: an adapter folder, or a model.
        dataset: given like that of `finetune`.
        max_length: longer conversations are left out, and counted.
        chat_template: a name in `templates/` or a path; None takes the one that lies with the model.
        layout, columns, roles: how the rows are written; as the settings of these names.

    Returns:
        {"loss", "perplexity", "token_accuracy", "supervised_tokens", "examples", "too_long"}, and for an adapter
        "base_loss", "base_perplexity" and "base_token_accuracy".

    Raises:
        UsageError: the model, the template or the data is wrong.
    """
    wishes = resolve({"layout": layout, "columns": columns or {}, "roles": roles or {}})
    sources = sources_of(dataset, wishes, split)
    loaded = load_model(path, device, trust_remote_code)
    speech = prepare_speech(loaded.tokenizer, loaded.model.generation_config, chat_template)
    variables = {**loaded.template_variables, **template_variables}
    stream = conversations_of(sources, Intake(), "error")
    prepared = prepare(stream, speech, max_length, variables=variables, **loaded.replies)
    pad_token_id = loaded.tokenizer.pad_token_id
    found: dict[str, Any] = measure(loaded.model, prepared.examples, pad_token_id, batch_size)
    found |= {"examples": len(prepared.examples), "too_long": len(prepared.too_long)}
    if loaded.is_adapter:
        with loaded.model.disable_adapter():
            base = measure(loaded.model, prepared.examples, pad_token_id, batch_size)
        found |= {f"base_{name}": base[name] for name in ("loss", "perplexity", "token_accuracy")}
    return found


def validate(
    dataset: Any = None,
    model: "str | Path | None" = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    config: "RunConfig | str | Path | Mapping[str, Any] | None" = None,
    **settings: Any,
) -> Report:
    """Reads every row and tells what is wrong with it; with a model, also what its chat template makes of it.

    Args:
        dataset: given like that of `finetune`.
        model: a folder or a hub name, of which only the tokenizer is read; None leaves tokens and templates out.
        settings: those of `finetune`.

    Raises:
        UsageError: the data, the template or the model cannot be had at all.
    """
    resolved, objects = _settings(config, settings, model, dataset, None)
    given = resolved.dataset if objects["dataset"] is None else objects["dataset"]
    if given is None:
        raise DataError("no data: give conversations with dataset (--dataset)")
    speech = load_speech(resolved, tokenizer) if resolved.model_name_or_path or tokenizer else None
    intake = Intake(names_repetitions=True)
    stream = conversations_of(sources_of(given, resolved, resolved.dataset_split), intake, "collect")
    return validate_conversations(stream, intake, speech, resolved)


def plan(
    model: "str | Path | PreTrainedModel | None" = None,
    dataset: Any = None,
    *,
    lengths: Sequence[int] | None = None,
    gpu: str | None = None,
    vram: str | float | None = None,
    calibrate: bool = False,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    config: "RunConfig | str | Path | Mapping[str, Any] | None" = None,
    **settings: Any,
) -> Plan:
    """Whether a run fits, what its memory is for, and how long it takes, before a weight is read or downloaded.

    Optimizer steps of the code that training runs are simulated on tensors without storage. With `auto: true` the
    fastest settings that fit are chosen.

    Args:
        model: a folder or a hub name, of which only the configuration is read, or a loaded model.
        dataset: given like that of `finetune`; its tokenizer is needed then. Its largest micro-batch decides.
        lengths: tokens of the examples, instead of a dataset. Neither: examples of `max_length`.
        gpu: a card by name, such as `rtx4090`.
        vram: memory of the GPU: `24GiB`, or 24. Neither: this machine, and what is free of it now.
        calibrate: take ten real steps on this machine, so that the seconds are its own.
        settings: those of `finetune`.

    Raises:
        UsageError: the model, the data, a setting or the device is wrong.
    """
    resolved, objects = _settings(config, settings, model, dataset, None)
    device = find_device(gpu, vram)
    if lengths is not None and (objects["dataset"] is not None or resolved.dataset is not None):
        raise SettingError("lengths and dataset are both given; choose one")
    if objects["dataset"] is None and resolved.dataset is None:
        blueprint = blueprint_of(resolved, device, given_model=objects["model"])
        work = Workload.of_lengths(lengths, resolved.max_length)
    else:
        speech = load_speech(resolved, tokenizer, objects["model"])
        blueprint = blueprint_of(resolved, device, speech, objects["model"])
        work = Workload.of_data(read_data(resolved, speech, objects["dataset"]), speech)
    check_positions(blueprint.shape, max(map(int, work.lengths)))
    measured = measured_steps(blueprint, work, device) if calibrate else None
    return (choose_settings if resolved.auto else make_plan)(blueprint, work, device, measured)


def plan_table(
    model: "str | Path | None" = None,
    *,
    config: "RunConfig | str | Path | Mapping[str, Any] | None" = None,
    **settings: Any,
) -> Table:
    """What the sizes of a model's family need by context length, and which context fits on which card.

    Raises:
        UsageError: the model or a setting is wrong.
    """
    resolved, _ = _settings(config, settings, model, None, None)
    return make_table(blueprint_of(resolved, find_device("rtx4090")))


def check(name: str, *, trust_remote_code: bool = False) -> list[Finding]:
    """How a chat template fares with every scenario: one of ours by name, a .jinja file, or that of a model.

    Raises:
        UsageError: there is no such template or model.
    """
    known = {template.name for template in shipped_templates()}
    if name in known or Path(name).suffix in (".jinja", ".j2"):
        tokenizer = tokenizer_for(find_template(name))
        stops = stop_tokens_of(tokenizer)
        return check_template(tokenizer, stop_tokens=[*stops, *filter(None, [guess_stop_token(tokenizer, stops)])])
    speech = load_speech(RunConfig(model_name_or_path=name, trust_remote_code=trust_remote_code))
    return check_template(speech.tokenizer, stop_tokens=speech.stop_tokens)


def preview(
    model: "str | Path | None" = None,
    dataset: Any = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    config: "RunConfig | str | Path | Mapping[str, Any] | None" = None,
    **settings: Any,
) -> Iterator[Preview]:
    """Every conversation as text and as tokens, in order, cut to nothing; the settings are those of `finetune`.

    Raises:
        UsageError: the model, the template or the data is wrong.
    """
    resolved, objects = _settings(config, settings, model, dataset, None)
    speech = load_speech(resolved, tokenizer)
    source = resolved.dataset if objects["dataset"] is None else objects["dataset"]
    if source is None:
        raise DataError("no data: give conversations with dataset (--dataset)")
    sources = sources_of(source, resolved, resolved.dataset_split)
    options = (resolved.chat_template_kwargs, resolved.turns, resolved.append_stop_token)
    for conversation in conversations_of(sources, Intake(), resolved.on_bad_row):
        for text in render_conversation(conversation, speech, *options):
            shown = look_at(text, speech.tokenizer, conversation.source)
            if len(shown.example.input_ids) > resolved.max_length:
                over = f"longer than max_length {resolved.max_length}: truncation is {resolved.truncation}"
                shown = replace(shown, warning=over)
            yield shown
