"""A written model and the adapter on its base, loaded by PEFT → every tensor held against what the layers stand for."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_sft.merging.base_files import weight_tensors
from lora_sft.merging.file_check import projected
from lora_sft.merging.merged import MergedModel
from lora_sft.merging.weight_check import Expected, WeightCheck, check_tensor, random_vectors, steps


def check_live(model: Any, merged: MergedModel, folder: Path, slack: float = 0.0) -> WeightCheck:
    """Every written tensor against what the layers of PEFT's model stand for."""
    layers = _Layers(model)
    found = []
    for name, tensor in weight_tensors(folder).items():
        place = merged.base.places.get(name)
        if place is None or not tensor.dtype.is_floating_point:
            found.append(check_tensor(name, tensor.dtype, False, projected(merged, name, tensor.read)))
            continue
        base, expected = layers.of(place.parameter, merged.is_turned_when_quantized(name))
        if place.matrix is not None:
            base, expected = base[place.matrix], expected[place.matrix]
        if place.turned:
            base, expected = base.mT, expected.mT
        pieces = _whole(tensor.read, base, expected, place.first_row, tensor.rows, tensor.columns, name)
        found.append(check_tensor(name, tensor.dtype, merged.is_edited(name), pieces, slack))
    return WeightCheck(found)


def _whole(
    read: Callable[[int, int], Tensor],
    base: Tensor,
    expected: Tensor,
    first: int,
    rows: int,
    columns: int,
    name: str,
) -> Expected:
    base, expected = base.reshape(-1, columns), expected.reshape(-1, columns)
    vectors, start = random_vectors(columns, name), 0
    for count in steps(rows, columns):
        there = slice(first + start, first + start + count)
        yield (
            read(start, start + count).float() @ vectors,
            base[there].float().cpu() @ vectors,
            expected[there].float().cpu() @ vectors,
        )
        start += count


class _Layers:
    """The layers of a PEFT model by the names that the base gives their parameters."""

    def __init__(self, model: Any) -> None:
        self._chains: dict[str, list[Any]] = defaultdict(list)
        for name, module in model.base_model.model.named_modules():
            self._chains[re.sub(r"\.(base_layer|original_module|token_adapter)\b", "", name)].append(module)

    def of(self, parameter: str, turned: bool) -> tuple[Tensor, Tensor]:
        """(the base's parameter, what it is with the adapter); `turned`: it was quantized the other way round."""
        from peft.tuners.lora.layer import LoraLayer, ParamWrapper
        from peft.tuners.trainable_tokens import TrainableTokensLayer
        from peft.utils.integrations import dequantize_module_weight
        from peft.utils.other import ModulesToSaveWrapper

        owner, _, leaf = parameter.rpartition(".")
        chain = self._chains[owner]
        inner = chain[-1]
        base = dequantize_module_weight(inner) if leaf == "weight" else getattr(inner, leaf)
        base = base.detach()
        expected = base
        for layer in reversed(chain):
            if isinstance(layer, ModulesToSaveWrapper):
                expected = getattr(layer.modules_to_save["default"], leaf).detach()
            elif isinstance(layer, TrainableTokensLayer) and leaf == "weight":
                expected = layer.get_merged_weights(["default"]).detach()
            elif isinstance(layer, ParamWrapper) and layer.parameter_name == leaf:
                expected = expected.float() + layer.get_delta_weight("default").detach().float()
            elif isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper) and "default" in layer.r:
                expected = _with_lora(layer, leaf, expected.float())
        is_turned = turned and leaf == "weight"
        return (base.T, expected.T) if is_turned else (base, expected)


def _with_lora(layer: Any, leaf: str, base: Tensor) -> Tensor:
    """A layer's weight or bias with its update, as PEFT 0.21 computes it."""
    if leaf == "bias":
        added = layer.lora_B["default"].bias if layer.lora_bias["default"] else None
        return base if added is None else torch.add(base, added.detach().float(), alpha=layer.scaling["default"])
    summed: Tensor = base + layer.get_delta_weight("default").detach().float()
    if not layer.use_dora.get("default"):
        return summed
    by_column = bool(getattr(layer, "fan_in_fan_out", False)) or len(layer.lora_embedding_A) > 0
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().float()
    dim = 0 if by_column else 1
    lengths: Tensor = magnitude / summed.norm(dim=dim)
    return summed * lengths.unsqueeze(dim)
