"""An adapter → a folder that vLLM serves on the base, and the command for it.

vLLM is not run here. What it accepts is taken from its documentation and source as of November 2026; that the update is
the adapter's, in the one form that vLLM computes right, is proven on what was written.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_sft.errors import ModelError
from lora_sft.exporting.normal_form import INSTEAD, NormalForm, adapts_embeddings, copy_accompanying, write_normal_form
from lora_sft.exporting.normal_form import refusals as normal_form_refusals
from lora_sft.exporting.target import Facts, Order, Target
from lora_sft.model.base import BaseSpec, read_config
from lora_sft.publishing.card import RANK_STEPS

WITHOUT_LORA = (
    "bloom",
    "dbrx",
    "falcon",
    "falcon_mamba",
    "flex_olmo",
    "gemma3n",
    "gpt2",
    "gpt_neox",
    "gptj",
    "jais2",
    "mamba",
    "mamba2",
    "mpt",
    "olmoe",
    "stablelm",
    "zamba2",
)
"""Model types that vLLM's list of supported models marks as not taking LoRA."""


def refusals(facts: Facts, options: Mapping[str, Any]) -> list[str]:
    """Why vLLM would not take this adapter, or would take it and compute something else."""
    problems = normal_form_refusals(facts, options)
    kind = facts.config.model_type
    if kind in WITHOUT_LORA:
        problems.append(f"vLLM takes no LoRA on {kind} models; {INSTEAD}")
    if names := adapts_embeddings(facts):
        # Removed together with added vocabularies; on the head it depends on the architecture.
        problems.append(f"{', '.join(names)}: vLLM takes no LoRA on embeddings, and on few heads; {INSTEAD}")
    ranks = [facts.adapter.get("r", 0), *(facts.adapter.get("rank_pattern") or {}).values()]
    if max(ranks) > RANK_STEPS[-1]:
        problems.append(f"rank {max(ranks)}: vLLM takes at most {RANK_STEPS[-1]}; {INSTEAD}")
    name = options.get("name")
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        problems.append(f"name {name!r}: a name to be asked for has letters, digits, '.', '_' and '-' only")
    return problems


def _write(order: Order) -> dict[str, Any]:
    config = read_config(order.spec)
    form = write_normal_form(order.adapter, order.folder, config)
    # Only now are the modules known for certain: a regex may have taken in more than it says.
    if problems := refusals(Facts({"target_modules": list(form.modules), "r": form.rank}, config, None), {}):
        raise ModelError.of(problems)
    copy_accompanying(order.adapter, order.folder)
    name = order.options.get("name") or re.sub(r"[^\w.-]+", "-", order.output.name)
    return {
        "verified": form.verified | {"vllm": "not run here"},
        "serve": shlex.join(serve_command(order, form, name)),
        "model": name,
        "rank": form.rank,
        "dtype": form.dtype,
        "notes": [*form.notes, *_base_notes(order.spec)],
    }


def serve_command(order: Order, form: NormalForm, name: str) -> list[str]:
    """The words of the command: base, adapter, and all that makes replies begin and end as in training."""
    spec, folder = order.spec, str(order.output)
    command = ["vllm", "serve", spec.name]
    if spec.revision and not Path(spec.name).is_dir():
        command += ["--revision", spec.revision]
    if spec.dtype != "float32":
        command += ["--dtype", spec.dtype]
    if spec.trust_remote_code:
        command.append("--trust-remote-code")
    command += ["--enable-lora", "--max-lora-rank", str(next(step for step in RANK_STEPS if step >= form.rank))]
    command += ["--lora-modules", _module(name, folder)]
    if (order.folder / "tokenizer_config.json").is_file():
        command += ["--tokenizer", folder]
    if (order.folder / "chat_template.jinja").is_file():
        command += ["--chat-template", f"{folder}/chat_template.jinja"]
    if (order.folder / "generation_config.json").is_file():
        # vLLM stops at the tokenizer's end token and at those of the generation config, by default the base's.
        command += ["--generation-config", folder]
    if variables := _template_variables(order.adapter):
        command += ["--default-chat-template-kwargs", json.dumps(variables)]
    return command


def _module(name: str, folder: str) -> str:
    """An adapter as `--lora-modules` reads it: name=path, or JSON where the path has signs of its own."""
    return json.dumps({"name": name, "path": folder}) if re.search("[=,]", folder) else f"{name}={folder}"


def _template_variables(adapter: Path) -> dict[str, Any]:
    file = adapter / "manifest.json"
    if not file.is_file():
        return {}
    variables: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")).get("chat_template_kwargs") or {}
    return variables


def _base_notes(spec: BaseSpec) -> list[str]:
    """What differs from training although all is as it should be."""
    notes = []
    if spec.quantization is not None:
        notes.append(
            f"trained on a base in {spec.quantization}, served on the full-precision one: near to what was trained, "
            "but not equal; a merged model is"
        )
    if spec.quantization == "nf4":
        notes.append(
            "with --quantization bitsandbytes vLLM makes NF4 of the base while loading"
            + ("" if spec.double_quant else ", with double quantization, which the training did not have")
            + "; it takes a quarter of the memory, and was not compared"
        )
    if spec.dtype == "float32":
        notes.append("trained in float32; vLLM computes LoRA in 16 bits")
    return notes


VLLM = Target(
    name="vllm",
    help="A folder that vLLM serves on the base, and the command for it.",
    refusals=refusals,
    write=_write,
    options={"name": "What requests ask for as `model`; by default the folder's name."},
    makes_whole_model=False,
)
