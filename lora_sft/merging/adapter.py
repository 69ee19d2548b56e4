"""An adapter folder and the base's skeleton → the edits of every parameter; each tensor of the adapter is used.

PEFT itself says which tensor belongs where and how it is scaled: the adapter is attached to a model without storage,
and the edits are read off its layers.
"""

import re
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_sft.errors import ModelError
from lora_sft.merging.edits import Addition, Edit, LowRank, Read, ReadRows, Replacement, Rows, straight, turned
from lora_sft.merging.tensor_file import stored_tensors
from lora_sft.model.foreign import WEIGHTS as WEIGHTS
from lora_sft.model.foreign import read_adapter_config

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts that take something out of the base: unless it was saved as a plain LoRA, the adapter needs that base."""

INSTEAD = "merge it with PEFT in memory: PeftModel.from_pretrained(…).merge_and_unload()"


@dataclass(frozen=True)
class AdapterEdits:
    """What an adapter does to its base.

    Attributes:
        edits: {parameter: its edits}.
        shares_embeddings: whether head and embeddings stay one matrix, if the base has one for both.
        ends_edited: whether one of them is edited at all.
    """

    edits: dict[str, list[Edit]]
    shares_embeddings: bool
    ends_edited: bool = False


def read_edits(folder: Path, skeleton: "PreTrainedModel") -> AdapterEdits:
    """The edits of one adapter. The skeleton is used up: PEFT attaches the adapter to it.

    Raises:
        ModelError: it cannot be merged, does not fit this base, or a tensor of it has no place; names which.
    """
    read_adapter_config(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    settings = _settings(folder)
    ends = _ends(skeleton)
    model = _attach(skeleton, settings, folder)
    reads = _reads(folder, model, settings)
    found: dict[str, list[Edit]] = defaultdict(list)
    tied = bool(getattr(settings, "ensure_weight_tying", False)) and skeleton_ties(skeleton)
    used: set[str] = set()
    for name, module in model.base_model.model.named_modules():
        if tied and f"{_plain(name)}.weight" == ends[-1]:
            used |= {key for key in reads if key.startswith(f"base_model.model.{name}.")}  # as the embeddings'
            continue
        for parameter, edit in _edits_of(name, module, reads, folder):
            found[parameter].append(edit)
            used.update(edit.keys)
    for key in reads.keys() - used:
        parameter = _plain(key)
        if parameter not in shapes:
            raise ModelError(f"{folder}: {key} has no place in this base; {INSTEAD}")
        found[parameter].insert(0, Replacement(reads[key].shape, reads[key].rows, (key,)))
    _check_shapes(found, shapes, ends, folder)
    only_rows = all(isinstance(edit, Rows) for end in ends for edit in found.get(end, []))
    return AdapterEdits(dict(found), tied or only_rows, any(end in found for end in ends))


def _ends(skeleton: "PreTrainedModel") -> list[str]:
    """The weights of embeddings and head, in this order."""
    ends = [skeleton.get_input_embeddings(), skeleton.get_output_embeddings()]
    names = {id(module): f"{name}.weight" for name, module in skeleton.named_modules()}
    return [names[id(module)] for module in ends if id(module) in names]


def skeleton_ties(skeleton: "PreTrainedModel") -> bool:
    """Whether embeddings and head are one matrix."""
    return bool(skeleton.config.get_text_config().tie_word_embeddings)


@dataclass(frozen=True)
class _Stored:
    """A tensor of the adapter, read when it is needed."""

    shape: tuple[int, ...]
    read: Read
    rows: ReadRows


def _settings(folder: Path) -> "LoraConfig":
    """PEFT's settings of an adapter that can be merged."""
    from peft import LoraConfig, PeftConfig

    try:
        settings = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}/adapter_config.json: PEFT does not take it: {error}") from None
    if not isinstance(settings, LoraConfig):
        raise ModelError(f"{folder}: is an adapter of the kind {settings.peft_type}; LoRA and its variants are merged")
    start = str(settings.init_lora_weights).lower()
    refused = {
        f"init_lora_weights {start}: it was not saved as a plain LoRA, and so needs the base that its start changed; "
        "save it with PEFT's path_initial_model_for_weight_conversion": start.startswith(CHANGES_BASE),
        "alora_invocation_tokens: it acts on a part of the text only": getattr(settings, "alora_invocation_tokens", 0),
        "layer_replication: the merged model would have other layers than its base": settings.layer_replication,
        "use_qalora: its update is pooled over the inputs": getattr(settings, "use_qalora", False),
        "arrow_config: it chooses among adapters for each token": getattr(settings, "arrow_config", None),
        "megatron_config: it is built for Megatron": settings.megatron_config,
    }
    if reasons := [reason for reason, is_so in refused.items() if is_so]:
        raise ModelError(f"{folder}: cannot be merged: {'; '.join(reasons)}")
    settings.init_lora_weights = False  # without storage there is nothing to start from
    settings.inference_mode = True
    return settings


def _attach(skeleton: "PreTrainedModel", settings: "LoraConfig", folder: Path) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights and of dtypes, which are looked after here
        try:
            return get_peft_model(skeleton, settings, low_cpu_mem_usage=True)
        except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
            raise ModelError(f"{folder}: the adapter does not fit its base: {str(error).splitlines()[0]}") from None


def _reads(folder: Path, model: Any, settings: "LoraConfig") -> dict[str, _Stored]:
    """{key as PEFT 0.21 writes it: the tensor, not read yet}; adapters of older layouts are brought to it first."""
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
        get_checkpoint_conversion_mapping,
    )

    stored = stored_tensors(folder / WEIGHTS)
    if get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return {_with_prefix(key): _Stored(one.shape, one.read, one.read) for key, one in stored.items()}
    tensors = {key: one.read() for key, one in stored.items()}
    tensors = convert_peft_adapter_state_dict_for_transformers(model, settings, tensors)
    return {
        _with_prefix(key): _Stored(tuple(tensor.shape), partial(_itself, tensor), partial(_rows_of, tensor))
        for key, tensor in tensors.items()
    }


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)[start:stop]


def _with_prefix(key: str) -> str:
    return key if key.startswith("base_model.model.") else f"base_model.model.{key}"


def _plain(name: str) -> str:
    """A name in PEFT's model → that of the base: `….q_proj.base_layer.bias` → `….q_proj.bias`."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.(base_layer|modules_to_save|original_module|token_adapter)(?=\.|$)", "", name)


def _edits_of(name: str, module: Any, reads: dict[str, _Stored], folder: Path) -> list[tuple[str, Edit]]:
    """What one module of PEFT's model does: (parameter of the base, edit); nothing for most modules."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import TrainableTokensWrapper

    key = f"base_model.model.{name}"
    if isinstance(module, TrainableTokensWrapper):
        adapter = module.token_adapter
        if adapter.tied_adapter:
            return []  # it is the same matrix, edited there
        stored = _of(f"{key}.token_adapter.trainable_tokens_delta", reads, folder)
        rows = Rows(tuple(adapter.token_indices["default"]), stored.read, (stored.key,))
        return [(f"{_plain(name)}.weight", rows)]
    if not isinstance(module, LoraLayer) or "default" not in module.r:
        return []
    return _edits_of_lora(name, key, module, reads, folder)


@dataclass(frozen=True)
class _Key:
    key: str
    shape: tuple[int, ...]
    read: Read


def _of(key: str, reads: dict[str, _Stored], folder: Path) -> _Key:
    if key not in reads:
        raise ModelError(f"{folder}/{WEIGHTS}: lacks {key}, which its settings announce; the file is not complete")
    return _Key(key, reads[key].shape, reads[key].read)


def _edits_of_lora(name: str, key: str, module: Any, reads: dict[str, _Stored], folder: Path) -> list[tuple[str, Edit]]:
    from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper

    scale = float(module.scaling["default"])
    if type(module) is ParamWrapper:
        a, b = (_of(f"{key}.lora_{one}.weight", reads, folder) for one in "AB")
        factors = partial(_of_expert, a.read, b.read, module.num_experts, swapped=module._did_swap_in_out_features)
        return [(f"{_plain(name)}.{module.parameter_name}", LowRank(factors, scale, (a.key, b.key)))]
    if type(module) is Embedding:
        a, b = (_of(f"{key}.lora_embedding_{one}", reads, folder) for one in "AB")
        edit = LowRank(partial(turned, a.read, b.read), scale, (a.key, b.key))
        return [(f"{_plain(name)}.weight", _with_magnitude(edit, key, module, reads, folder, by_column=True))]
    if type(module) is not Linear:
        raise ModelError(f"{folder}: {_plain(name)}: a {type(module).__name__} layer cannot be merged here; {INSTEAD}")
    a, b = (_of(f"{key}.lora_{one}.weight", reads, folder) for one in "AB")
    is_turned = bool(module.fan_in_fan_out)  # GPT-2 keeps (inputs, outputs)
    edit = LowRank(partial(turned if is_turned else straight, a.read, b.read), scale, (a.key, b.key))
    edits: list[tuple[str, Edit]] = [
        (f"{_plain(name)}.weight", _with_magnitude(edit, key, module, reads, folder, by_column=is_turned))
    ]
    if module.lora_bias["default"]:
        bias = _of(f"{key}.lora_B.bias", reads, folder)
        edits.append((f"{_plain(name)}.bias", Addition(bias.read, scale, (bias.key,))))
    return edits


def _with_magnitude(
    edit: LowRank, key: str, module: Any, reads: dict[str, _Stored], folder: Path, by_column: bool
) -> LowRank:
    """The edit with DoRA's lengths, if it is one; any other variant is refused."""
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant

    variant = module.lora_variant.get("default")
    if variant is None:
        return edit
    if not isinstance(variant, (DoraLinearVariant, DoraEmbeddingVariant)) or module.lora_bias["default"]:
        raise ModelError(f"{folder}: {_plain(key)}: {type(variant).__name__} cannot be merged here; {INSTEAD}")
    stored = _of(f"{key}.lora_magnitude_vector", reads, folder)
    return replace(edit, magnitude=stored.read, by_column=by_column, keys=(*edit.keys, stored.key))


def _of_expert(a: Read, b: Read, experts: int, expert: int, *, swapped: bool) -> tuple[Tensor, Tensor]:
    """A (experts · rank, inputs), B (outputs, rank · experts) → factors of one expert's matrix.

    Source: `ParamWrapper.get_delta_factors` of PEFT 0.21.
    """
    whole_a, whole_b = a(), b()
    one_a = whole_a.reshape(experts, -1, whole_a.shape[-1])[expert]
    one_b = whole_b.reshape(whole_b.shape[0], -1, experts)[..., expert]
    return (one_b, one_a) if swapped or experts == 1 else (one_a.T, one_b.T)


def _check_shapes(
    found: dict[str, list[Edit]], shapes: dict[str, tuple[int, ...]], ends: list[str], folder: Path
) -> None:
    """Every edit must have the size of what it edits; embeddings and head may have grown by added tokens."""
    problems = []
    for parameter, edits in found.items():
        shape = shapes.get(parameter)
        if shape is None:
            problems.append(f"{parameter}: the base has no such parameter")
            continue
        if parameter in ends:
            shape = (max([shape[0], *(_rows_after(edit) for edit in edits)]), *shape[1:])
        for edit in edits:
            wanted: tuple[int, ...] = shape[-2:] if isinstance(edit, LowRank) else shape
            has: tuple[int, ...]
            if isinstance(edit, LowRank):
                left, right = edit.factors(0)
                has = (left.shape[0], right.shape[1])
            elif isinstance(edit, Replacement):
                has = edit.shape
            elif isinstance(edit, Rows):
                has = (shape[0], *edit.read().shape[1:])
            else:
                has = tuple(edit.read().shape)
            if tuple(has) != tuple(wanted):
                problems.append(f"{parameter}: the adapter has {tuple(has)}, the base {tuple(wanted)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(f"{folder}: the adapter does not fit its base: {'; '.join(problems[:3])}{more}")


def _rows_after(edit: Edit) -> int:
    """How many rows a parameter must have for an edit that can make it grow."""
    if isinstance(edit, Rows):
        return max(edit.indices, default=-1) + 1
    return edit.shape[0] if isinstance(edit, Replacement) else 0
