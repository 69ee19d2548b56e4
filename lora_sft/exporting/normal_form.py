"""An adapter folder → the same update in the one form that every server reads right: one rank, alpha = rank.

Servers disagree on rsLoRA and on patterns of ranks and alphas: vLLM applies one alpha / r to all modules, llama.cpp
divides by each tensor's own rank. Where alpha = rank and all ranks are equal, all of them multiply by one.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_sft.errors import ModelError, VerificationError
from lora_sft.exporting.target import Facts, Order, Target

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
PREFIX = "base_model.model."
TOLERANCE = 1e-6
"""Largest difference that folding and padding may make, relative to the largest output of the module's update."""

INSTEAD = "merge instead: lora-sft merge ADAPTER --output DIR"

ACCOMPANYING = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*",
    "generation_config.json",
    "manifest.json",
)
"""Files of an adapter folder that say how to talk with it, and how its base was loaded."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_VARIANTS = {
    "alora_invocation_tokens": "aLoRA applies the update from an invocation on only",
    "use_qalora": "QA-LoRA pools the inputs of the update",
    "use_bdlora": "BD-LoRA has block-diagonal matrices",
    "arrow_config": "Arrow chooses among several adapters",
    "kasa_config": "KaSA changes the base and has a third matrix",
    "monteclora_config": "MonteCLoRA has more weights than two matrices",
    "layer_replication": "layer_replication repeats layers of the base",
    "target_parameters": "target_parameters adapts fused parameters (such as experts), not whole modules",
    "trainable_token_indices": "trained rows of the embeddings are no low-rank update",
    "modules_to_save": "whole trained modules are no low-rank update",
    "use_dora": "DoRA scales the sum of weight and update",
    "lora_bias": "a bias on the update is no low-rank update",
}
_UNFIT = (
    ("lora_magnitude_vector", "use_dora"),
    ("trainable_tokens", "trainable_token_indices"),
    ("lora_B.bias", "lora_bias"),
    ("lora_diag", "kasa_config"),
)
_PAIR = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?(embedding)|\.weight)"
)


@dataclass(frozen=True)
class NormalForm:
    """What was written.

    Attributes:
        rank: of every module; alpha is the same.
        modules: the adapted modules by their names in the base, such as `model.layers.0.self_attn.q_proj`.
        dtype: of the written matrices.
        largest_difference: between the update read back and the original one, on random inputs in float64; relative
            to the largest output of the module, over all modules.
        notes: what was changed, for a person.
    """

    rank: int
    modules: tuple[str, ...]
    dtype: str
    largest_difference: float
    notes: tuple[str, ...] = ()

    @property
    def verified(self) -> dict[str, Any]:
        """For the result of an export."""
        return {"modules": len(self.modules), "largest_relative_difference": self.largest_difference}


@dataclass(frozen=True)
class Update:
    """The update of one module: scale · B A.

    Attributes:
        a: (rank, inputs), as stored.
        b: (outputs, rank), as stored.
        scale: as PEFT computes it.
        is_embedding: whether it is stored under the names that PEFT gives to embeddings.
    """

    a: Tensor
    b: Tensor
    scale: float
    is_embedding: bool = False

    def names(self, module: str) -> tuple[str, str]:
        """What its two matrices are called in an adapter file."""
        kind, end = ("lora_embedding_", "") if self.is_embedding else ("lora_", ".weight")
        return f"{PREFIX}{module}.{kind}A{end}", f"{PREFIX}{module}.{kind}B{end}"

    def __call__(self, inputs: Tensor) -> Tensor:
        """(inputs, n) → (outputs, n), in float64."""
        return self.scale * (self.b.double() @ (self.a.double() @ inputs))


def refusals(facts: Facts, options: Mapping[str, Any]) -> list[str]:
    """Why an adapter with these settings has no normal form; empty if it has one."""
    reasons = _reasons(facts.adapter)
    if facts.adds_tokens:
        reasons.append("the vocabulary grew, and the new rows of the embeddings are no low-rank update")
    return [_refusal(reason) for reason in reasons]


def _reasons(settings: Mapping[str, Any]) -> list[str]:
    """What in PEFT's settings goes beyond low-rank updates of whole modules."""
    reasons = [words for name, words in _VARIANTS.items() if settings.get(name)]
    if settings.get("peft_type", "LORA") != "LORA":
        reasons.append(f"{settings['peft_type']} is another method than LoRA")
    if settings.get("bias", "none") != "none":
        reasons.append(f"bias: {settings['bias']} trains the biases of the base")
    return reasons


def _refusal(reason: str) -> str:
    return f"{reason}, so that the adapter has no form that every server reads right; {INSTEAD}"


def adapts_embeddings(facts: Facts) -> list[str]:
    """Names of the base's embeddings and head, as far as LoRA adapts them."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    chosen = {name: facts.adapter.get(name) for name in ("target_modules", "exclude_modules")}
    if not chosen["target_modules"]:
        return []
    model = _skeleton(facts.config)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    return [name for name in names if check_target_module_exists(LoraConfig(**chosen), name)]


def write_normal_form(adapter: Path, folder: Path, config: "PretrainedConfig", rank: int | None = None) -> NormalForm:
    """Writes the normal form of an adapter as a PEFT adapter, and proves that its update is the same.

    Args:
        adapter: the adapter folder.
        folder: gets `adapter_model.safetensors` and `adapter_config.json`.
        config: the base's; the adapter must fit it.
        rank: of the result, if it shall be more than the largest rank in the adapter.

    Raises:
        ModelError: the adapter has no normal form, or does not fit the base; says what to do instead.
        VerificationError: what was written is another update.
    """
    from safetensors.torch import save_file

    settings = json.loads((adapter / SETTINGS).read_text(encoding="utf-8"))
    updates = read_updates(adapter, settings)
    _check_fit(adapter, updates, config)
    rank = max([rank or 0, *(update.a.shape[0] for update in updates.values())])
    dtype = _dtype_that_keeps(updates)
    tensors: dict[str, Tensor] = {}
    for module, update in updates.items():
        a, b = update.names(module)
        tensors[a] = _padded(update.a.to(dtype), (rank, update.a.shape[1]))
        tensors[b] = _padded((update.b.double() * update.scale).to(dtype), (update.b.shape[0], rank))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    written = _settings(settings, rank, sorted(updates))
    (folder / SETTINGS).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    difference = _largest_difference(updates, read_updates(folder, written))
    return NormalForm(rank, tuple(updates), str(dtype).split(".")[1], difference, _notes(updates, rank, dtype))


def read_updates(adapter: Path, settings: Mapping[str, Any]) -> dict[str, Update]:
    """{module: its update}; every tensor in the adapter file is used.

    Args:
        settings: the contents of `adapter_config.json`.

    Raises:
        ModelError: the adapter holds more than low-rank updates of whole modules, or contradicts its settings.
    """
    from safetensors import safe_open

    if not (adapter / WEIGHTS).is_file():
        raise ModelError(f"{adapter}: no {WEIGHTS} here; other weight files are not read, since loading can run code")
    if problems := _refusals_once_saved(settings):
        raise ModelError.of([f"{adapter}: {problem}" for problem in problems])
    sides: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no dict
            found = _PAIR.fullmatch(name)
            if not found or "base_layer" in name or ".experts." in name:
                raise ModelError(f"{adapter}: the tensor {name}: {_refusal(_why_unfit(name))}")
            sides.setdefault(found["module"], {})[found["side"]] = file.get_tensor(name)
            if found["embedding"]:
                embeddings.add(found["module"])
    return {module: _update(adapter, module, pair, settings, module in embeddings) for module, pair in sides.items()}


def _update(
    adapter: Path, module: str, pair: Mapping[str, Tensor], settings: Mapping[str, Any], is_embedding: bool
) -> Update:
    if set(pair) != {"A", "B"} or any(tensor.dim() != 2 for tensor in pair.values()):
        raise ModelError(f"{adapter}: {module} lacks one of its two matrices; the file is damaged, save it again")
    rank, scale = _rank_and_scale(module, settings)
    if (pair["A"].shape[0], pair["B"].shape[1]) != (rank, rank):
        raise ModelError(
            f"{adapter}: {module} has matrices of {tuple(pair['A'].shape)} and {tuple(pair['B'].shape)}, but its "
            f"rank in {SETTINGS} is {rank}; the two files are not of the same adapter"
        )
    return Update(pair["A"], pair["B"], scale, is_embedding)


def _rank_and_scale(module: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """The rank of a module, and what PEFT multiplies its update by.

    Source: `LoraModel._create_and_replace` and `LoraLayer.update_layer` in PEFT 0.21.
    """
    from peft.utils.other import get_pattern_key

    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), module), settings["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), module), settings["lora_alpha"])
    return rank, alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _refusals_once_saved(settings: Mapping[str, Any]) -> list[str]:
    """What the settings of a saved adapter rule out: also a start that changed the base and was not undone."""
    start = settings.get("init_lora_weights")
    problems = [_refusal(reason) for reason in _reasons(settings)]
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        problems.append(
            f"init_lora_weights {start} belongs to a base that was changed at the start of training; convert it to a "
            "plain LoRA where it was trained (PEFT: path_initial_model_for_weight_conversion)"
        )
    return problems


def _why_unfit(name: str) -> str:
    """What a tensor that is no matrix of a plain LoRA says about the adapter."""
    if ".experts." in name or ("base_layer" in name and "lora_" in name):
        return _VARIANTS["target_parameters"]
    for part, setting in _UNFIT:
        if part in name:
            return _VARIANTS[setting]
    if name.endswith(".bias"):
        return "a trained bias of the base is no low-rank update"
    return "a whole weight is no low-rank update"


def _check_fit(adapter: Path, updates: Mapping[str, Update], config: "PretrainedConfig") -> None:
    """Every update must be of a module of the base, with its inputs and outputs."""
    modules = dict(_skeleton(config).named_modules())
    for module, update in updates.items():
        weight = getattr(modules.get(module), "weight", None)
        if weight is None:
            raise ModelError(f"{adapter}: adapts {module}, which a {config.model_type} model has not; wrong base?")
        # Embeddings and GPT-2's Conv1D keep their weight as (inputs, outputs).
        if {update.b.shape[0], update.a.shape[1]} != set(weight.shape):
            raise ModelError(
                f"{adapter}: adapts {module} from {update.a.shape[1]} to {update.b.shape[0]}, but the base's weight is "
                f"{tuple(weight.shape)}; wrong base?"
            )


def _skeleton(config: "PretrainedConfig") -> Any:
    """The base without storage: module names and shapes."""
    from lora_sft.model.base import BaseSpec, skeleton

    # Settings whose class came with the base can only be here because its code was trusted before.
    is_trusted = type(config).__module__.startswith("transformers_modules")
    return skeleton(config, BaseSpec(config._name_or_path, trust_remote_code=is_trusted))


def _dtype_that_keeps(updates: Mapping[str, Update]) -> torch.dtype:
    """The dtype of the adapter, where scale · B is exact in it; else float32, whose rounding is below 1e-7."""
    dtypes = {tensor.dtype for update in updates.values() for tensor in (update.a, update.b)}
    if len(dtypes) > 1:
        return torch.float32
    dtype = dtypes.pop()
    exact = all(
        torch.equal((scaled := update.b.double() * update.scale).to(dtype).double(), scaled)
        for update in updates.values()
    )
    return dtype if exact else torch.float32


def _padded(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix with zeros added on the right and below."""
    padded = torch.zeros(shape, dtype=matrix.dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _settings(settings: Mapping[str, Any], rank: int, modules: list[str]) -> dict[str, Any]:
    """`adapter_config.json` of the normal form: what servers look at, and nothing of the training."""
    return {
        "peft_type": "LORA",
        "task_type": settings.get("task_type"),
        "base_model_name_or_path": settings.get("base_model_name_or_path"),
        "revision": settings.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "fan_in_fan_out": settings.get("fan_in_fan_out", False),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }


def _largest_difference(before: Mapping[str, Update], after: Mapping[str, Update]) -> float:
    """Compares two adapters on random inputs, module by module.

    Raises:
        VerificationError: another set of modules, or a difference beyond the tolerance.
    """
    if set(before) != set(after):
        raise VerificationError(f"the normal form adapts other modules: {sorted(set(before) ^ set(after))[:3]}")
    draw = torch.Generator().manual_seed(0)
    largest, where = 0.0, ""
    for module, update in before.items():
        inputs = torch.randn(update.a.shape[1], 4, generator=draw, dtype=torch.float64)
        old, new = update(inputs), after[module](inputs)
        difference = ((new - old).abs().max() / old.abs().max().clamp_min(1e-300)).item()
        # Written as a negation, so that NaN is the largest of all.
        if not difference <= largest:
            largest, where = difference, module
    if not largest <= TOLERANCE:
        raise VerificationError(
            f"the normal form is another update: {where} differs by {largest:.1e} of its largest output, where "
            f"{TOLERANCE:.0e} is allowed; a weight that is not finite, or a damaged file"
        )
    return largest


def _notes(updates: Mapping[str, Update], rank: int, dtype: torch.dtype) -> tuple[str, ...]:
    """What is different from the adapter, for a person."""
    ranks = sorted({update.a.shape[0] for update in updates.values()})
    scales = sorted({update.scale for update in updates.values()})
    stored = {update.b.dtype for update in updates.values()}
    notes = []
    if ranks != [rank]:
        notes.append(f"ranks {', '.join(map(str, ranks))} → {rank}, filled with zeros")
    if scales != [1.0]:
        notes.append(
            f"scale {scales[0]:.4g}{f' to {scales[-1]:.4g}' if len(scales) > 1 else ''} → 1, multiplied into B"
        )
    if stored != {dtype}:
        notes.append(f"stored as {str(dtype).split('.')[1]}: in 16 bits the scaled B would be rounded")
    return tuple(notes)


def copy_accompanying(adapter: Path, folder: Path) -> None:
    """Copies tokenizer, chat template, generation config and manifest of an adapter, as far as it has them."""
    for file in {file for pattern in ACCOMPANYING for file in adapter.glob(pattern) if file.is_file()}:
        copy = folder / file.relative_to(adapter)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _write(order: Order) -> dict[str, Any]:
    from lora_sft.model.base import read_config

    form = write_normal_form(order.adapter, order.folder, read_config(order.spec))
    copy_accompanying(order.adapter, order.folder)
    return {"verified": form.verified, "rank": form.rank, "dtype": form.dtype, "notes": list(form.notes)}


ADAPTER = Target(
    name="adapter",
    help="The adapter in the form that every server reads right: one rank, alpha = rank, no rsLoRA, no patterns.",
    refusals=refusals,
    write=_write,
    makes_whole_model=False,
)
