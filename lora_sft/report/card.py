"""Manifest and settings of a run → the model card, `README.md` of the output folder."""

import json
from pathlib import Path
from typing import Any

from lora_sft.config import RunConfig


def model_card(manifest: dict[str, Any], config: RunConfig, name: str) -> str:
    """The card in Markdown, with the front matter that the hub reads. It holds no local path."""
    base, data, result = manifest["base"], manifest["data"], manifest["result"]
    base_name = _public(base["name"])
    front = ["---", "library_name: peft", "pipeline_tag: text-generation", "tags: [lora, sft, lora_sft]"]
    front += [f"base_model: {base_name}"] if base_name == base["name"] else []
    commit = f" at `{base['commit']}`" if base["commit"] else ""
    double = " with double quantization" if base["double_quant"] else ""
    precision = f"{base['quantization']}{double}, " if base["quantization"] else ""
    software = ", ".join(
        f"{package} {manifest['versions'][package]}" for package in ("lora_sft", "transformers", "trl", "peft", "torch")
    )
    evaluation = f", evaluation loss {result['eval_loss']:.4f}" if "eval_loss" in result else ""
    return "\n".join(
        [
            *front,
            "---",
            f"# {name}",
            "",
            f"A LoRA adapter of **{base_name}**{commit}, trained by supervised fine-tuning on the assistant's words "
            "alone.",
            "",
            "| | |",
            "|---|---|",
            f"| base in training | {precision}{base['dtype']} |",
            f"| adapter | {_adapter(config)} |",
            f"| data | {data['examples']:,} conversations, {data['supervised_tokens']:,} of {data['tokens']:,} "
            f"tokens learned, sha256 `{data['sha256'][:16]}` |",
            f"| steps | {result['steps']:,}, learning rate {config.learning_rate:g}, seed {config.seed} |",
            f"| result | training loss {result['train_loss']:.4f}{evaluation} |",
            f"| software | {software} |",
            "",
            "```python",
            "from lora_sft import load",
            "",
            f'print(load("{name}").chat("Hello!"))',
            "```",
            "",
            "Every setting is in `run.yaml`; hashes and versions are in `manifest.json`. Replies end with "
            f"{_code(manifest['stop_tokens'])}.",
            "",
        ]
    )


def _public(name: str) -> str:
    """A hub name as it is; of a local folder its last part."""
    return Path(name).name if Path(name).is_absolute() else name


def _adapter(config: RunConfig) -> str:
    targets = config.lora_target_modules
    kinds = [name for name, on in (("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)) if on]
    return ", ".join(
        [
            f"rank {config.lora_r}",
            f"alpha {config.lora_alpha}",
            targets if isinstance(targets, str) else " ".join(targets),
            *kinds,
        ]
    )


def _code(tokens: list[str]) -> str:
    return ", ".join(f"`{json.dumps(token)[1:-1]}`" for token in tokens)
