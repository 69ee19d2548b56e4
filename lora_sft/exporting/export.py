"""An adapter folder and the name of a target → a folder that is served there, proven by the target itself."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lora_sft.config import RunConfig
from lora_sft.errors import ModelError, SettingError
from lora_sft.exporting.target import Facts, Order, Target
from lora_sft.exporting.targets import find_target, nearest
from lora_sft.merging.merge import look_at_parts
from lora_sft.merging.staging import refuse_used, staged
from lora_sft.model.base import BaseSpec, read_config
from lora_sft.model.device import peak_bytes
from lora_sft.model.disk import writing
from lora_sft.model.loading import manifest_of, tokenizer_of, trained_base
from lora_sft.training.job import Job

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BASES = ("trained", "original")


def export(
    adapter: str | Path,
    target: str,
    output: str | Path | None = None,
    base: str = "trained",
    device: str = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Writes an adapter, or base and adapter as one model, in the form that a server wants, and proves what it wrote.

    Args:
        adapter: the adapter folder.
        target: a name in `TARGETS`.
        output: folder of the result; must not exist yet, or be empty. A target that sends the result away does
            without.
        base: what a whole model is made from: trained (the weights that training saw: of a quantized base,
            dequantized) or original (as published).
        device: where the adapter runs on its base to be compared with.
        trust_remote_code: run Python code that comes with the base.
        force: export although the adapter or its base is not as the run that made the adapter left it.
        options: of the target, as `lora-sft export --help` lists them.

    Returns:
        {"output_dir", "target", "base", "onto" (of a whole model), "dtype" (where there is one), "verified", "serve",
        "notes", "peak_rss_bytes", "seconds"}, and what else the target tells.

    Raises:
        SettingError: no such target or option.
        ModelError: no adapter there, its base cannot be had, or the target refuses it; every reason is given.
        OutputError: the output folder holds something, or the disk has no room.
        VerificationError: the result is not what was trained; it is kept under a name that says so.
    """
    clock = time.perf_counter()
    asked = find_target(target)
    given = {name: value for name, value in options.items() if value is not None}
    _check_wishes(asked, output, base, given)
    folder = Path(adapter).expanduser().absolute()
    final = None if output is None else Path(output).expanduser().absolute()
    if final is not None:
        refuse_used(final)
    spec = trained_base(folder, device, trust_remote_code, as_recorded=True)
    look_at_parts(folder, spec, force)
    if problems := asked.refusals(facts_of(folder, spec), given):
        raise ModelError.of([f"{target}: {words}" for words in problems])
    with _place_for(final, folder.name) as (place, name):
        found = asked.write(Order(folder, spec, place, name, base, given))
    return {
        "output_dir": None if final is None else str(final),
        "target": target,
        "base": spec.name,
        **({"onto": base} if asked.makes_whole_model else {}),
        "serve": None,
        "notes": [],
        **found,
        "peak_rss_bytes": peak_bytes("cpu"),
        "seconds": round(time.perf_counter() - clock, 1),
    }


def _check_wishes(target: Target, output: str | Path | None, base: str, options: Mapping[str, Any]) -> None:
    """Raises SettingError for all that can be seen without looking at any file."""
    problems = [
        f'{target.name} has no option "{name}"{nearest(name, target.options)}'
        for name in options
        if name not in target.options
    ]
    if base not in BASES:
        problems.append(f"base {base!r} is not one of {', '.join(BASES)}")
    elif base != "trained" and not target.makes_whole_model:
        problems.append(f"base {base}: {target.name} leaves the base as it is; this is for targets of whole models")
    if output is None and target.keeps_folder:
        problems.append(f"{target.name} writes a folder: name it with output (--output)")
    if problems:
        raise SettingError.of(problems)


@contextmanager
def _place_for(output: Path | None, name: str) -> Iterator[tuple[Path, Path]]:
    """Where to write, and what it will be called; without an output it is gone in the end."""
    if output is not None:
        with staged(output) as folder:
            yield folder, output
        return
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        with writing(folder):
            folder.mkdir()
            yield folder, folder


def facts_of(adapter: Path, spec: BaseSpec) -> Facts:
    """What is known of a trained adapter without any weight.

    Raises:
        ModelError: its base or tokenizer cannot be had.
    """
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config, tokenizer = read_config(spec), tokenizer_of(adapter, spec)
    variables = manifest_of(adapter).get("chat_template_kwargs") or {}
    return Facts(settings, config, tokenizer, _grows(config, tokenizer), variables)


def facts_of_job(job: Job, model: "PreTrainedModel | None" = None) -> Facts:
    """What is known of an adapter that is yet to be trained; `model` if the base was given loaded."""
    config = read_config(job.spec) if model is None else model.config
    tokenizer, settings = job.speech.tokenizer, {**job.lora.to_dict(), "base_model_name_or_path": job.spec.name}
    settings |= _as_saved(job.config, settings)
    return Facts(settings, config, tokenizer, _grows(config, tokenizer), job.config.chat_template_kwargs)


def _as_saved(config: RunConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """After a start that changes the base, the adapter is saved as a plain one of twice the rank."""
    if not config.start_changes_base:
        return {}
    twice = {name: 2 * rank for name, rank in (settings.get("rank_pattern") or {}).items()}
    return {"init_lora_weights": True, "r": 2 * settings["r"], "rank_pattern": twice}


def _grows(config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> bool:
    return len(tokenizer) > int(config.get_text_config().vocab_size)


def refuse_exports(job: Job, model: "PreTrainedModel | None" = None) -> None:
    """Asks every target of `export_to`, before training, what it would refuse afterwards.

    Raises:
        SettingError: no such target, or one that cannot be asked yet.
        ModelError: gives every reason of every target.
    """
    targets = [find_target(name) for name in job.config.export_to]
    if away := [target.name for target in targets if not target.keeps_folder]:
        raise SettingError(f"export_to: {away[0]} needs options that are given at the export; leave it out here")
    if not targets:
        return
    facts = facts_of_job(job, model)
    problems = [f"export_to: {one.name}: {words}" for one in targets for words in one.refusals(facts, {})]
    if problems:
        raise ModelError.of(problems)
