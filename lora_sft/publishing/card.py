"""Manifest, settings and numbers of a run → the model card, `README.md`; it names no path of this machine.

It is read by people who choose a model, so it is short: what it is, how it was made, how well it fits, how to serve it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_sft.config import RunConfig
from lora_sft.model.loading import MANIFEST
from lora_sft.publishing.public import is_hub_name, public_name, read_json, read_metrics, read_run, without_paths

CURVE_POINTS = 8
"""Rows of the table of losses."""

NOT_TOLD = frozenset(
    {"model_name_or_path", "dataset", "eval_dataset", "output_dir", "data_cache", "device", "dataset_num_proc"}
    | {"resume_from_checkpoint", "resume_with_changed", "report_to", "logging_steps"}
    | {"save_strategy", "save_steps", "save_total_limit", "stop_when_diverging", "max_lost_share", "preflight"}
    | {"eval_strategy", "eval_steps", "per_device_eval_batch_size"}
)
"""Settings that say where things lay and when to look, not what was learned."""

RANK_STEPS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be; the adapter's own rank may be anything up to that."""

Manifest = Mapping[str, Any]
Lines = Sequence[Mapping[str, Any]]


def model_card(
    manifest: Manifest | None,
    config: RunConfig | None,
    name: str,
    curve: Lines = (),
    *,
    adapter: Mapping[str, Any] | None = None,
    base: str | None = None,
    licence: Mapping[str, str] | None = None,
    verified: Mapping[str, Any] | None = None,
) -> str:
    """The card of an adapter, in Markdown with the front matter that the hub reads.

    Args:
        manifest, config: of the run; None for an adapter that was trained elsewhere.
        name: a hub name, or that of the folder.
        curve: the lines of `metrics.jsonl`.
        adapter: PEFT's settings; None takes them from `config`.
        base: the base's name; None takes it from the manifest.
        licence: {"license", "license_name", "license_link"} of the base, as far as known; None looks beside a base
            that lies in a folder.
        verified: how an export of it compares with the adapter on its base.
    """
    recorded = (manifest or {}).get("base", {})
    base = base or recorded.get("name") or (adapter or {}).get("base_model_name_or_path") or ""
    shape = dict(adapter) if adapter is not None else _shape_of(config)
    licence = licence_beside(base) if licence is None else licence
    trained = ", trained by supervised fine-tuning on the assistant's words alone" if manifest else ""
    rows = {
        "base": _base_words(base, _commit_of(base, recorded, shape)),
        "base in training": _precision(recorded),
        "adapter": _adapter_words(shape),
        **_training_rows(manifest, config),
        "licence": _licence_words(licence),
    }
    return _join(
        _front("peft", "adapter", base, config, licence, ["lora", "sft"] if manifest else ["lora"]),
        [
            f"# {name.rpartition('/')[2]}",
            "",
            f"A LoRA adapter of **{public_name(base) or 'an unknown base'}**{trained}.",
        ],
        _table(rows),
        _results(manifest, curve),
        _verification(verified),
        _settings(config),
        ["## How to use it", "", *_serve_adapter(name, base, recorded, shape), *_stop_words(manifest)],
    )


def merged_card(
    manifest: Manifest | None,
    verified: Mapping[str, Any] | None,
    name: str,
    *,
    base: str,
    dtype: str,
    onto: str = "trained",
    quantize: str | None = None,
    adapters: Sequence[str] = (),
    config: RunConfig | None = None,
    curve: Lines = (),
    licence: Mapping[str, str] | None = None,
) -> str:
    """The card of a merged model.

    Args:
        manifest, config, curve, licence: as of `model_card`.
        verified: how the written model compares with the adapter on its base; None if that was not measured.
        name: a hub name, or that of the folder.
        base: a hub name, or a folder of which the last part is told.
        dtype: of the written weights.
        onto: which base the update was added to, `trained` or `original`.
        quantize: to what the weights were quantized after merging.
        adapters: names of what was merged, with their weights if there are several.
    """
    recorded = (manifest or {}).get("base", {})
    licence = licence_beside(base) if licence is None else licence
    merged = f" ({', '.join(f'`{public_name(one)}`' for one in adapters)})" if adapters else ""
    what = "A LoRA adapter is" if len(adapters) < 2 else "LoRA adapters are"
    rows = {
        "base": _base_words(base, _commit_of(base, recorded)),
        "base in training": _precision(recorded),
        "merged onto": _onto_words(onto, recorded),
        "weights": dtype + (f", then quantized to {quantize}" if quantize else ""),
        **_training_rows(manifest, config),
        "licence": _licence_words(licence),
    }
    return _join(
        _front("transformers", "finetune", base, config, licence, ["lora", "sft", "merged"]),
        [
            f"# {name.rpartition('/')[2]}",
            "",
            f"**{public_name(base)}** after supervised fine-tuning. {what} merged into "
            f"its weights{merged}: it is a plain model, and needs no PEFT.",
        ],
        _table(rows),
        _verification(verified) or ["## Verified", "", "Not compared with the adapter on its base."],
        _results(manifest, curve),
        _settings(config),
        ["## How to use it", "", *_serve_merged(name), *_stop_words(manifest)],
    )


def card_of(folder: Path, name: str, **more: Any) -> str:
    """The card of an adapter folder, of ours or of anybody's; `more` as of `model_card`."""
    manifest, adapter = read_json(folder / MANIFEST), read_json(folder / "adapter_config.json")
    return model_card(manifest or None, read_run(folder), name, read_metrics(folder), adapter=adapter, **more)


def licence_beside(base: str) -> dict[str, str]:
    """The licence that the card of a base in a folder names; empty if it names none."""
    readme = Path(base) / "README.md"
    return licence_in(readme.read_text(encoding="utf-8", errors="replace")) if base and readme.is_file() else {}


def licence_in(card: str) -> dict[str, str]:
    """The licence fields of a card's front matter; empty if it has none."""
    start, _, rest = card.partition("---\n")
    if start.strip() or "\n---" not in rest:
        return {}
    try:
        data = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    named = data if isinstance(data, dict) else {}
    return {key: named[key] for key in ("license", "license_name", "license_link") if isinstance(named.get(key), str)}


# --- parts -------------------------------------------------------------------------------------------------


def _front(
    library: str, relation: str, base: str, config: RunConfig | None, licence: Mapping[str, str], tags: list[str]
) -> list[str]:
    """The front matter. A base or data set without a hub name is left out: the hub would link to a stranger's."""
    front: dict[str, Any] = {"base_model": base, "base_model_relation": relation} if is_hub_name(base) else {}
    front |= {"datasets": datasets} if (datasets := _hub_datasets(config)) else {}
    front |= {"library_name": library, **licence, "pipeline_tag": "text-generation", "tags": [*tags, "lora_sft"]}
    return ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---"]


def _hub_datasets(config: RunConfig | None) -> list[str]:
    given = config.dataset if config else None
    sources = given if isinstance(given, list) else [given or ""]
    names = [source if isinstance(source, str) else source.path for source in sources]
    files = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".gz", ".zst", ".txt")
    return [name for name in names if is_hub_name(name) and "/" in name and not name.endswith(files)]


def _base_words(base: str, commit: str | None) -> str:
    return f"`{public_name(base)}`{f' at commit `{commit}`' if commit else ''}" if base else "not named"


def _commit_of(base: str, recorded: Mapping[str, Any], adapter: Mapping[str, Any] | None = None) -> str | None:
    """The commit of a base, if it is this one that it was recorded of."""
    if recorded.get("name") == base:
        return recorded.get("commit")
    named = adapter or {}
    return named.get("revision") if named.get("base_model_name_or_path") == base else None


def _precision(base: Mapping[str, Any]) -> str | None:
    """`nf4 with double quantization, bfloat16`."""
    if not base:
        return None
    double = " with double quantization" if base.get("double_quant") else ""
    return (f"{base['quantization']}{double}, " if base.get("quantization") else "") + str(base.get("dtype"))


def _onto_words(onto: str, base: Mapping[str, Any]) -> str:
    if onto == "original":
        return "the original base" + (
            f", though it was {base['quantization']} in training" if base.get("quantization") else ""
        )
    if base.get("quantization"):
        return f"the base as trained: the values that its {base['quantization']} weights stand for"
    return "the base as trained"


def _shape_of(config: RunConfig | None) -> dict[str, Any]:
    """Our settings of an adapter by PEFT's names."""
    if config is None:
        return {}
    renamed = {
        "target_modules": config.lora_target_modules,
        "target_parameters": config.lora_target_parameters,
        "rank_pattern": config.lora_rank_pattern,
        "alpha_pattern": config.lora_alpha_pattern,
        "modules_to_save": config.lora_modules_to_save,
        "trainable_token_indices": config.new_tokens,
    }
    kept = {name: getattr(config, name) for name in ("lora_alpha", "use_rslora", "use_dora")}
    return {"r": config.lora_r, **kept, **renamed, **config.lora_config}


def _adapter_words(shape: Mapping[str, Any]) -> str | None:
    """`rank 16, alpha 32, rsLoRA, on q_proj v_proj`."""
    if not shape:
        return None
    targets = shape.get("target_modules") or []
    names = [targets] if isinstance(targets, str) else sorted({str(name).rpartition(".")[2] for name in targets})
    kinds = {
        "rsLoRA": shape.get("use_rslora"),
        "DoRA": shape.get("use_dora"),
        "other ranks or alphas for some modules": shape.get("rank_pattern") or shape.get("alpha_pattern"),
        "new tokens": shape.get("trainable_token_indices"),
        "biases": shape.get("bias", "none") != "none" or shape.get("lora_bias"),
    }
    whole = [f"{' '.join(shape['modules_to_save'])} trained in full"] if shape.get("modules_to_save") else []
    on = [f"on {' '.join([*names, *(shape.get('target_parameters') or [])])}"]
    chosen = [kind for kind, is_on in kinds.items() if is_on]
    return ", ".join([f"rank {shape.get('r')}", f"alpha {shape.get('lora_alpha')}", *on, *chosen, *whole])


def _training_rows(manifest: Manifest | None, config: RunConfig | None) -> dict[str, str | None]:
    """What a manifest of ours records; nothing for an adapter that was trained elsewhere."""
    if not manifest:
        return {}
    data, result, versions = manifest["data"], manifest["result"], manifest["versions"]
    packages = ("lora_sft", "transformers", "trl", "peft", "torch")
    how = f", learning rate {config.learning_rate:g}, seed {config.seed}" if config else ""
    return {
        "data": f"{data['examples']:,} conversations; {data['supervised_tokens']:,} of their {data['tokens']:,} tokens "
        "are learned",
        "hash of the data": f"sha256 `{data['sha256']}` (tokens and labels, in order)",
        "hash of the chat template": f"sha256 `{manifest['chat_template_sha256']}`",
        "steps": f"{result['steps']:,} over {result['supervised_tokens']:,} learned tokens{how}",
        "software": ", ".join(f"{package} {versions[package]}" for package in packages if versions.get(package)),
    }


def _licence_words(licence: Mapping[str, str]) -> str:
    if not licence:
        return "not stated here; that of the base applies"
    link = licence.get("license_link")
    name = licence.get("license_name") or licence.get("license", "other")
    return f"{f'[{name}]({link})' if link and '://' in link else name} (that of the base)"


def _results(manifest: Manifest | None, curve: Lines) -> list[str]:
    """Losses at the end, and a table of how they came down: it is shown everywhere, which a chart is not."""
    if not manifest:
        return []
    result = manifest["result"]
    words = [f"Training loss {result['train_loss']:.4f} (mean over the run, nats a learned token)."]
    if "eval_loss" in result:
        held_out = manifest["data"].get("evaluation_examples", 0)
        loss = result["eval_loss"]
        perplexity = f", perplexity {math.exp(loss):,.2f}" if loss < 20 else ""
        words.append(f"Evaluation loss {loss:.4f}{perplexity}, on {held_out:,} conversations that were not trained on.")
    else:
        words.append("It was not evaluated on held-out conversations.")
    return ["## Results", "", " ".join(words), *_curve_table(curve)]


def _curve_table(curve: Lines) -> list[str]:
    trained = {int(line["step"]): line["loss"] for line in curve if "loss" in line}
    evaluated = {int(line["step"]): line["eval_loss"] for line in curve if "eval_loss" in line}
    steps = sorted({*_spread(sorted(trained)), *_spread(sorted(evaluated))})
    if len(steps) < 2:
        return []
    head = ["", "| step | training loss | evaluation loss |", "|---:|---:|---:|"]
    return [*head, *(f"| {step:,} | {_number(trained.get(step))} | {_number(evaluated.get(step))} |" for step in steps)]


def _spread(steps: Sequence[int]) -> list[int]:
    """At most `CURVE_POINTS` of them, evenly, with the first and the last."""
    if len(steps) <= CURVE_POINTS:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (CURVE_POINTS - 1))] for index in range(CURVE_POINTS)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _verification(verified: Mapping[str, Any] | None) -> list[str]:
    line = verification_line(verified or {})
    return ["## Verified", "", f"Read back and compared with the adapter on its base: {line}."] if line else []


def verification_line(verified: Mapping[str, Any]) -> str:
    """`mean KL 5.7e-14, at most 1.2e-12 (the adapter's own effect: 6.2e-02, …), …`; what is not known is not said."""

    def known(name: str, form: str) -> list[str]:
        return [form.format(verified[name])] if isinstance(verified.get(name), (int, float)) else []

    effect = known("adapter_effect", "the adapter's own effect: {:.1e}") + known(
        "share_lost", "of which {:.2%} is lost"
    )
    kl = ", ".join(known("mean_kl", "mean KL {:.1e}") + known("max_kl", "at most {:.1e}"))
    parts = [f"{kl} ({', '.join(effect)})" if effect else kl] if kl else []
    parts += known("max_abs_logit_diff", "largest logit difference {:.1e}")
    parts += known("top1_agreement", "same first choice at {:.1%} of positions")
    weights = verified.get("weights") or {}
    checked = "{edited} of {tensors} tensors changed, {failing} not as they must be"
    return "; ".join(filter(None, [", ".join(parts), checked.format(**weights) if weights else ""]))


def _settings(config: RunConfig | None) -> list[str]:
    """Those that are not the default; all of them are in `run.yaml`."""
    if config is None:
        return []
    chosen = without_paths(config.model_dump(exclude_defaults=True, exclude=set(NOT_TOLD)))
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in chosen.items()]
    return ["## Settings", "", "Those that are not lora_sft's default:", "", "```yaml", *(lines or ["# none"]), "```"]


def _stop_words(manifest: Manifest | None) -> list[str]:
    tokens = (manifest or {}).get("stop_tokens") or []
    shown = ", ".join(f"`{json.dumps(token, ensure_ascii=False)[1:-1]}`" for token in tokens)
    return ["", f"A reply ends with {shown}; the chat template lies beside the tokenizer."] if tokens else []


# --- serving -----------------------------------------------------------------------------------------------


def is_plain(adapter: Mapping[str, Any]) -> bool:
    """Whether a server that multiplies every update by alpha / rank computes what PEFT does."""
    more = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")
    targets = adapter.get("target_modules") or []
    ends = [name.rpartition(".")[2] for name in ([targets] if isinstance(targets, str) else targets)]
    return (
        not any(adapter.get(name) for name in (*more, "target_parameters", "lora_bias"))
        and adapter.get("bias", "none") == "none"
        and not {"embed_tokens", "lm_head", "wte", "embed_out"} & set(ends)
    )


def _serve_adapter(name: str, base: str, recorded: Mapping[str, Any], shape: Mapping[str, Any]) -> list[str]:
    short = name.rpartition("/")[2]
    lines = [*_python(_peft_words(name, recorded)), ""]
    lines += ["With lora_sft, to talk to it, or as a plain merged model for any server:", "", "```bash"]
    lines += [f"hf download {name} --local-dir {short}"] if "/" in name else []
    lines += [f"lora-sft chat {short}", f"lora-sft merge {short} --output {short}-merged", "```"]
    rank = next((step for step in RANK_STEPS if step >= shape.get("r", 8)), None)
    if rank and is_hub_name(base) and "/" in name and is_plain(shape):
        words = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {short}={name}"
        lines += ["", "With vLLM beside its base, if that takes LoRA there:", "", "```bash", words, "```"]
    return lines


def _peft_words(name: str, recorded: Mapping[str, Any]) -> list[str]:
    """Python that loads the adapter on its base as it was in training."""
    quantization, dtype = recorded.get("quantization"), recorded.get("dtype", "auto")
    settings = {"int8": "load_in_8bit=True"}.get(
        str(quantization),
        f'load_in_4bit=True, bnb_4bit_quant_type="{quantization}", bnb_4bit_compute_dtype="{dtype}", '
        f"bnb_4bit_use_double_quant={bool(recorded.get('double_quant'))}",
    )
    bits = ", BitsAndBytesConfig" if quantization else ""
    return [
        "from peft import AutoPeftModelForCausalLM",
        f"from transformers import AutoTokenizer{bits}",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        *([f"base_as_trained = BitsAndBytesConfig({settings})"] if quantization else []),
        f'model = AutoPeftModelForCausalLM.from_pretrained("{name}", dtype="{dtype}"'
        f"{', quantization_config=base_as_trained' if quantization else ''})",
    ]


def _serve_merged(name: str) -> list[str]:
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")',
    ]
    return [*_python(load), "", "With vLLM:", "", "```bash", f"vllm serve {name}", "```"]


def _python(load: list[str]) -> list[str]:
    """`load` makes `tokenizer` and `model`; what follows has a talk with it."""
    return [
        "```python",
        *load,
        'messages = [{"role": "user", "content": "Hello!"}]',
        "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, "
        'return_tensors="pt")',
        "reply = model.generate(**prompt.to(model.device), max_new_tokens=200)",
        'print(tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
    ]


# --- Markdown ----------------------------------------------------------------------------------------------


def _table(rows: Mapping[str, str | None]) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        *(f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items() if value),
    ]


def _join(*parts: Sequence[str]) -> str:
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"
