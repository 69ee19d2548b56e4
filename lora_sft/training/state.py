"""The state of a training (nested values with tensors inside) ↔ plain files, which are read without running code.

Tensors go into a safetensors file, all else into JSON. torch.save would write a pickle.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_sft.errors import OutputError, RunError

WEIGHTS = "adapter_model.safetensors"
TENSORS = "state.safetensors"
REST = "state.json"


def write_state(folder: Path, state: Any) -> None:
    """Writes `state.json`, and `state.safetensors` with the tensors that are in it.

    Args:
        state: None, booleans, numbers, strings, tensors, NumPy arrays, and lists, tuples and dicts of those.

    Raises:
        RunError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    rest = _pack(state, tensors)
    save_file(_apart(tensors), folder / TENSORS)
    (folder / REST).write_text(json.dumps(rest), encoding="utf-8")


def read_state(folder: Path) -> Any:
    """What `write_state` was given, to the bit; tensors on the CPU."""
    rest = json.loads((folder / REST).read_text(encoding="utf-8"))
    return _unpack(rest, load_file(folder / TENSORS))


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value → JSON, and the tensors in it are put into `tensors`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        items = [_pack(item, tensors) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"dict": [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]}
    raise RunError(
        f"checkpoint: the optimizer or scheduler keeps a {type(value).__name__}, which cannot be written as plain "
        "data; choose another optim or lr_scheduler_type, or set save_strategy: no"
    )


def _unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(packed, list):
        return [_unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "array" in packed:
        return np.array(packed["array"], dtype=packed["dtype"])
    if "tuple" in packed:
        return tuple(_unpack(item, tensors) for item in packed["tuple"])
    return {_unpack(key, tensors): _unpack(item, tensors) for key, item in packed["dict"]}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, each with storage of its own: safetensors refuses two in one, such as the code table that
    8-bit optimizers share."""
    taken: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        apart[name] = own.clone() if own.untyped_storage().data_ptr() in taken else own
        taken.add(apart[name].untyped_storage().data_ptr())
    return apart


def trained_tensors(model: PeftModel) -> dict[str, Tensor]:
    """{name in the adapter file: the tensor that is trained, not a copy of it}."""
    found: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return found


def write_weights(folder: Path, model: PeftModel) -> None:
    """Writes the adapter in the form that PEFT loads, in the dtype of the training."""
    save_file(_apart(trained_tensors(model)), folder / WEIGHTS, {"format": "pt"})
    settings = model.peft_config["default"]
    for_training = settings.inference_mode
    settings.inference_mode = True
    try:
        settings.save_pretrained(str(folder))
    finally:
        settings.inference_mode = for_training


def read_weights(folder: Path, model: PeftModel) -> None:
    """Puts the weights of a checkpoint into the model, bit for bit: neither cast nor made anew.

    Raises:
        OutputError: they are of another adapter.
    """
    stored, places = load_file(folder / WEIGHTS), trained_tensors(model)
    reached = {place.untyped_storage().data_ptr() for place in places.values()}
    missed = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.untyped_storage().data_ptr() not in reached
    ]
    wrong = [*missed, *sorted(stored.keys() ^ places.keys())]
    for name in stored.keys() & places.keys():
        if (stored[name].shape, stored[name].dtype) != (places[name].shape, places[name].dtype):
            wrong.append(name)
    if wrong:
        raise OutputError(f"{folder / WEIGHTS}: is of another adapter than this one; the first difference: {wrong[0]}")
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(stored[name])
