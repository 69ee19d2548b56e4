"""A model's configuration → the model as it will be loaded, quantized or not, without its weights or any storage."""

from typing import TYPE_CHECKING, Any

from lora_sft.model.base import (
    BLOCKSIZE,
    BaseSpec,
    keep_weights_unpacked,
    quantization_config,
    quantized_modules,
    skeleton,
)

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

NESTED_BLOCKSIZE = 256
"""4-bit scales that share a scale, where they are quantized too."""


def outline(config: "PretrainedConfig", spec: BaseSpec) -> "PreTrainedModel":
    """What `load_base` would give, on the `meta` device: the same modules, shapes, dtypes and quantization states.

    Raises:
        ModelError: the model cannot be built.
    """
    import torch

    model = skeleton(config, spec, getattr(torch, spec.dtype))
    if spec.quantization is not None:
        _quantize(model, spec)
    return model.requires_grad_(False)


def _quantize(model: "PreTrainedModel", spec: BaseSpec) -> None:
    """Puts bitsandbytes' layers where transformers would, with weights that say that they are quantized."""
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.integrations import replace_with_bnb_linear

    chosen = quantized_modules(model)
    others = [name for name, _ in model.named_modules() if name not in chosen]
    leaves = [name for name in others if not any(True for _ in model.get_submodule(name).children())]
    replace_with_bnb_linear(model, leaves, quantization_config(spec))
    for name in chosen:
        layer = model.get_submodule(name)
        if isinstance(layer, Linear4bit):
            layer.weight = _weight_in_4_bits(layer, spec)
        elif isinstance(layer, Linear8bitLt):
            layer.weight = _weight_in_8_bits(layer)
        if layer.bias is not None:
            layer.bias = torch.nn.Parameter(layer.bias.to(getattr(torch, spec.dtype)), requires_grad=False)
    model.is_loaded_in_4bit = spec.quantization != "int8"
    model.is_loaded_in_8bit = spec.quantization == "int8"
    keep_weights_unpacked(model)


def _weight_in_4_bits(layer: Any, spec: BaseSpec) -> Any:
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    count = layer.in_features * layer.out_features
    blocks = -(-count // BLOCKSIZE)
    state: dict[str, Any] = {
        "shape": torch.Size((layer.out_features, layer.in_features)),
        "code": _empty(16),
        "blocksize": BLOCKSIZE,
        "quant_type": spec.quantization,
        "dtype": getattr(torch, spec.dtype),
    }
    if spec.double_quant:
        scales = QuantState(
            absmax=_empty(-(-blocks // NESTED_BLOCKSIZE)),
            code=_empty(256),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
        absmax = _empty(blocks, dtype=torch.uint8)
        found = QuantState(absmax=absmax, state2=scales, offset=_empty(), **state)
    else:
        found = QuantState(absmax=_empty(blocks), **state)

    class Outlined(Params4bit):  # type: ignore[misc]
        """bitsandbytes 0.50 copies such a weight by way of one without its shape, which torch refuses without storage;
        PEFT copies the layers that DoRA adapts."""

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return _weight_in_4_bits(layer, spec)

    Outlined.__name__ = "Params4bit"  # by which PEFT knows it
    return Outlined(
        _empty((count + 1) // 2, 1, dtype=torch.uint8),
        quant_state=found,
        blocksize=BLOCKSIZE,
        compress_statistics=spec.double_quant,
        quant_type=spec.quantization or "nf4",
        module=layer,
        bnb_quantized=True,
    )


def _weight_in_8_bits(layer: Any) -> Any:
    import torch
    from bitsandbytes.nn import Int8Params

    rows = _empty(layer.out_features, layer.in_features, dtype=torch.int8)
    return Int8Params(rows, requires_grad=False, CB=rows, SCB=_empty(layer.out_features))


def _empty(*shape: int, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    import torch

    return torch.empty(shape, dtype=dtype or torch.float32, device="meta")
