"""The commonest adapter, LoRA on named linear layers and nothing else, → its edits, from its two files alone.

Neither PEFT nor transformers is imported for it, which would take longer and more memory than merging a small model.
Whatever is not certain from the files is left to `adapter.py`, which asks PEFT.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lora_sft.merging.edits import Edit, LowRank, straight
from lora_sft.merging.tensor_file import StoredTensor, stored_tensors
from lora_sft.model.foreign import read_adapter_config

LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
ENDS = ("embed", "wte", "word_embeddings", "lm_head", "output", "head")
"""In names of embeddings and heads: whether those are one matrix, the files do not tell."""

PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
NO_MATTER = frozenset(
    {"peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r"}
    | {"target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "init_lora_weights", "use_rslora"}
    | {"layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config", "peft_version"}
    | {"lora_ga_config", "runtime_config", "low_cpu_mem_usage", "megatron_core", "qalora_group_size"}
)
"""Settings that change nothing for tensors that are there, or are read here; any other that is set leads to PEFT."""


def plain_edits(folder: Path, weights_file: str, base: Mapping[str, StoredTensor]) -> dict[str, list[Edit]] | None:
    """{tensor of the base: its edits}; None if the adapter is more than that, or its place is not certain.

    Args:
        base: the base's tensors, by their names on disk.
    """
    settings = read_adapter_config(folder)
    if not _is_plain(settings):
        return None
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in stored_tensors(folder / weights_file).items():
        match = LORA.fullmatch(key)
        if match is None:
            return None
        pairs.setdefault(match[1], {})[match[2]] = tensor
    found: dict[str, list[Edit]] = {}
    oriented = False
    for module, pair in pairs.items():
        weight = base.get(f"{module}.weight")
        if weight is None or pair.keys() != {"A", "B"} or any(end in module.rpartition(".")[2] for end in ENDS):
            return None
        a, b = pair["A"], pair["B"]
        if weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != settings["r"] or b.shape[1] != settings["r"]:
            return None
        oriented = oriented or weight.shape[0] != weight.shape[1]
        scale = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])
        found[f"{module}.weight"] = [LowRank(partial(straight, a.read, b.read), scale, (a.name, b.name))]
    return found if oriented else None  # square weights alone do not tell which way round they lie


def _is_plain(settings: Mapping[str, Any]) -> bool:
    others = {name: value for name, value in settings.items() if name not in NO_MATTER}
    is_set = [name for name, value in others.items() if value not in (None, False, "none", [], {}, "")]
    start = str(settings.get("init_lora_weights", True)).lower()
    return settings.get("peft_type") == "LORA" and start in PLAIN_STARTS and not is_set
