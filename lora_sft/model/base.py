"""Settings → the base model: first what can be known without its weights, then the weights."""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sft.config import RunConfig
from lora_sft.console import say
from lora_sft.errors import ModelError
from lora_sft.model.device import choose_device, choose_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# It would warn at import that an optional package of CPU kernels is not there; nothing is slower or wrong for it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


INDEX = "model.safetensors.index.json"

BLOCKSIZE = 64
"""Weights that share a scale when they are quantized to 4 bits."""


@dataclass(frozen=True)
class BaseSpec:
    """How the base model is loaded; recorded in `manifest.json`, so that merge and chat load the same one.

    Attributes:
        name: folder or hub name.
        revision: branch, tag or commit of a hub model.
        quantization: nf4, fp4, int8 or None.
        double_quant: whether the scales of 4-bit blocks are quantized too.
        dtype: bfloat16, float16 or float32: of the arithmetic, and of weights that are not quantized.
        device: `cpu` or `cuda:N`.
    """

    name: str
    revision: str | None = None
    quantization: str | None = None
    double_quant: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


def name_base(config: RunConfig) -> BaseSpec:
    """Settings → which model, all else left at its default: enough for the small files that lie with it.

    Raises:
        ModelError: no model named.
    """
    if not config.model_name_or_path:
        raise ModelError("no base model: give one with model_name_or_path (--model), a folder or a hub name")
    return BaseSpec(
        _absolute(config.model_name_or_path), config.model_revision, trust_remote_code=config.trust_remote_code
    )


def choose_base(config: RunConfig) -> BaseSpec:
    """Settings → how the base will be loaded; each choice is said with its reason.

    Raises:
        ModelError: no model named, or the device cannot do what was asked for.
    """
    named = name_base(config)
    device = choose_device(config.device)
    dtype, why = choose_dtype(config.bf16, config.fp16, device)
    say("precision", f"{dtype} ({why})")
    return with_precision(named, config, dtype, device)


def with_precision(named: BaseSpec, config: RunConfig, dtype: str, device: str) -> BaseSpec:
    """A model that is named → how the settings have it loaded, in that dtype and on that device."""
    quantization = _quantization(config)
    return replace(
        named,
        quantization=quantization,
        double_quant=config.bnb_4bit_use_double_quant and quantization in ("nf4", "fp4"),
        dtype=dtype,
        device=device,
        attn_implementation=config.attn_implementation,
    )


def _absolute(name: str) -> str:
    """A folder's whole path, so that the adapter finds its base from anywhere; a hub name as it is."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def _quantization(config: RunConfig) -> str | None:
    if config.load_in_8bit:
        return "int8"
    if config.load_in_4bit is None and config.start_needs_whole_base:
        say("base", f"not quantized (lora_init {config.lora_init} needs the whole weights)")
        return None
    if config.load_in_4bit is False:
        return None
    if config.load_in_4bit is None:
        double = " with double quantization" if config.bnb_4bit_use_double_quant else ""
        say("base", f"4-bit {config.bnb_4bit_quant_type}{double} (the default; load_in_4bit: false keeps all bits)")
    return config.bnb_4bit_quant_type


def read_config(spec: BaseSpec, needs_weights: bool = True) -> "PretrainedConfig":
    """The model's `config.json`, without its weights.

    Args:
        needs_weights: whether a folder has to hold them.

    Raises:
        ModelError: there is no such model, it needs code that is not trusted, or it is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(spec.name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model {spec.name}: this folder has no config.json, so it is no model in the transformers format"
        )
    if not folder.is_dir() and (folder.is_absolute() or spec.name.startswith((".", "~")) or spec.name.count("/") > 1):
        raise ModelError(f"model {spec.name}: no such folder (looked in {Path.cwd()})")
    try:
        config = AutoConfig.from_pretrained(spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {spec.name}: cannot be had: {_first_line(error)}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping and not spec.trust_remote_code:
        raise ModelError(f"model {spec.name}: {config.model_type} is no causal language model that transformers knows")
    if folder.is_dir() and (folder / INDEX).is_file():
        shards_of(folder)
    if needs_weights and folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"model {spec.name}: no .safetensors file in this folder; other weight files are not read, since loading "
            "them can run code"
        )
    method = getattr(config, "quantization_config", None)
    if method is not None:
        method = method if isinstance(method, dict) else method.to_dict()
        raise ModelError(
            f"model {spec.name}: is stored quantized ({method.get('quant_method')}); give the full-precision model, "
            "which is quantized while loading"
        )
    return config


def shards_of(folder: Path) -> dict[str, str]:
    """{tensor: the file of the folder in which it lies}, as the index says.

    Raises:
        ModelError: it is no index, or names a file that lies elsewhere.
    """
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(found.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / INDEX}: is no index of weights: {error}") from None
    for name in files:
        inside(folder, name)
    return dict(found)


def inside(folder: Path, name: Any) -> Path:
    """A file that a model names → its path.

    Raises:
        ModelError: it lies outside the model's folder. The hub's cache links to `blobs` beside the snapshots.
    """
    if not isinstance(name, str) or not name or "\0" in name or Path(name).name != name or not name.isprintable():
        raise ModelError(f"{folder}: names the file {name!r}, which is none of this folder")
    found, home = (folder / name).resolve(), folder.resolve()
    in_cache = home.parent.name == "snapshots" and found.is_relative_to(home.parent.parent / "blobs")
    if not found.is_relative_to(home) and not in_cache:
        raise ModelError(f"{folder / name}: is a link to {found}, outside the model's folder; it is not read")
    return folder / name


def skeleton(config: "PretrainedConfig", spec: BaseSpec, dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """The model without storage (on the `meta` device): module names and shapes, in well under a second.

    Args:
        dtype: of its weights; None: as transformers chooses it, where only shapes count.

    Raises:
        ModelError: what the settings ask for is not installed or not known.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                trust_remote_code=spec.trust_remote_code,
                attn_implementation=spec.attn_implementation,
                **({} if dtype is None else {"dtype": dtype}),
            )
    except (ImportError, ValueError) as error:
        raise ModelError(f"model {spec.name}: cannot be built: {_first_line(error)}") from None


def grow_vocabulary(model: "PreTrainedModel", tokens: int) -> None:
    """Adds rows to the embeddings (and the head) for tokens that have none; drawn around the mean of the others."""
    if tokens > model.get_input_embeddings().num_embeddings:
        on_meta = model.device.type == "meta"
        model.resize_token_embeddings(tokens, mean_resizing=not on_meta)


def load_base(spec: BaseSpec) -> "PreTrainedModel":
    """Reads the weights, quantizing them on the way.

    Raises:
        ModelError: the weights cannot be read.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            spec.name,
            revision=spec.revision,
            dtype=getattr(torch, spec.dtype),
            quantization_config=quantization_config(spec),
            device_map={"": spec.device},
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        raise ModelError(f"model {spec.name}: the weights cannot be read: {_first_line(error)}") from None
    if spec.quantization is not None:
        refuse_odd_widths(input_widths(model), spec)
    keep_weights_unpacked(model)
    return model


def quantized_modules(model: Any, skipped: Iterable[str] | None = None) -> set[str]:
    """Names of the modules that bitsandbytes quantizes, of a model that is not quantized or of its skeleton.

    Args:
        skipped: those that it left out, as a manifest records them; None: as transformers chooses them.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, Conv1D)}
    if skipped is not None:
        return linear - set(skipped)
    chosen = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {name for name in linear if should_convert_module(name, chosen)}


def quantization_record(model: Any) -> dict[str, Any]:
    """What a quantized model must be known by to make its weights again: {"blocksize", "skipped"}; else empty."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    if not any(isinstance(module, (Linear4bit, Linear8bitLt)) for module in modules.values()):
        return {}
    blocks = {module.weight.quant_state.blocksize for module in modules.values() if isinstance(module, Linear4bit)}
    plain = [name for name, module in modules.items() if type(module) is nn.Linear or isinstance(module, Conv1D)]
    added = re.compile(r"^base_model\.model\.|\.(base_layer|original_module|modules_to_save\.\w+|token_adapter)\b")
    skipped = {added.sub("", name) for name in plain if ".lora_" not in name}
    return {"blocksize": min(blocks, default=None), "skipped": sorted(skipped)}


def refuse_odd_widths(widths: Mapping[str, int], spec: BaseSpec) -> None:
    """On the CPU bitsandbytes restores 4-bit weights wrongly where a row does not end with a block.

    Its kernel takes every row to begin a new block, which quantizing does not do. bitsandbytes 0.50; remove when
    `dequantize_4bit` of a (96, 80) weight gives on the CPU what it gives for the same weight as one row.

    Args:
        widths: {module: its inputs}, of those that are quantized.

    Raises:
        ModelError: names the first such module.
    """
    odd = [name for name in widths if widths[name] % BLOCKSIZE]
    if odd and spec.quantization in ("nf4", "fp4") and spec.device == "cpu":
        raise ModelError(
            f"model {spec.name}: {odd[0]} has {widths[odd[0]]} inputs, no multiple of {BLOCKSIZE}, and bitsandbytes "
            "computes such 4-bit weights wrongly on the CPU; set load_in_4bit: false, or use a GPU"
        )


def input_widths(model: Any) -> dict[str, int]:
    """{module that is, or will be, quantized: its inputs}."""
    from bitsandbytes.nn import Linear4bit
    from transformers.pytorch_utils import Conv1D

    quantized = {name: module.in_features for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    return quantized or {
        name: module.nx if isinstance(module := model.get_submodule(name), Conv1D) else module.in_features
        for name in sorted(quantized_modules(model))
    }


def quantized_share(model: "PreTrainedModel") -> float:
    """Which share of the weights is quantized: bitsandbytes takes linear layers, no embeddings, no fused experts."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    quantized = [module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt))]
    inside = sum(module.in_features * module.out_features for module in quantized)
    held = {id(module.weight) for module in quantized}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in held)
    return float(inside / max(inside + outside, 1))


def quantization_config(spec: BaseSpec) -> Any:
    """The `BitsAndBytesConfig` of a spec; None if nothing is quantized."""
    if spec.quantization is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
    )


def keep_weights_unpacked(model: Any) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place when a model is evaluated on the CPU.

    On CPUs with AVX512-BF16 a `Linear4bit` in eval mode repacks its weight: afterwards dequantizing, merging and
    saving are wrong, and no gradient flows through it. bitsandbytes 0.50; remove when repacking keeps the original.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
