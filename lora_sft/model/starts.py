"""Starts of an adapter that need more than the weights at hand: EVA (real rows), LoftQ (the unquantized weights)."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sft.errors import ModelError
from lora_sft.model.base import BaseSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


def start_from_rows(model: "PeftModel", batches: Iterable[dict[str, "Tensor"]]) -> None:
    """EVA: A becomes the main directions of each layer's inputs on `batches`, and the ranks are shared out anew.

    Args:
        batches: `input_ids`, `attention_mask` and `labels`, each (batch, length).
    """
    from peft import initialize_lora_eva_weights

    initialize_lora_eva_weights(model, list(batches), show_progress_bar=False)


def start_from_rounding(model: "PeftModel", spec: BaseSpec) -> None:
    """LoftQ with one step: the adapter starts as the best low-rank copy of what quantization rounded away.

    PEFT's own `replace_lora_weights_loftq` runs on CUDA only and leaves out the adapter's scaling.

    Raises:
        ModelError: the unquantized weights cannot be found under their names.

    Source: LoftQ, arXiv 2310.08659, algorithm 1 with T = 1.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer

    original = _weights_of(spec)
    with torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, LoraLayer) or not isinstance(module.get_base_layer(), Linear4bit):
                continue
            quantized = module.get_base_layer().weight
            weight = original(name.removeprefix("base_model.model.") + ".weight").to(quantized.device, torch.float32)
            lost = weight - dequantize_4bit(quantized.data, quantized.quant_state).float()
            left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
            rank = module.r["default"]
            roots = sizes[:rank].sqrt()
            module.lora_A["default"].weight.copy_(roots[:, None] * right[:rank])
            module.lora_B["default"].weight.copy_(left[:, :rank] * roots / module.scaling["default"])


def _weights_of(spec: BaseSpec) -> Callable[[str], Any]:
    """A reader of single tensors out of the model's safetensors files."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = Path(spec.name)
    if not folder.is_dir():
        folder = Path(snapshot_download(spec.name, revision=spec.revision, allow_patterns=["*.safetensors"]))
    files: list[Any] = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
    homes = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - no dict

    def read(name: str) -> Any:
        if name not in homes:
            raise ModelError(
                f"lora_init loftq: {spec.name} has no weight called {name} in its files; use another lora_init"
            )
        return homes[name].get_tensor(name)

    return read
