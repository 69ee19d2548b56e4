"""A folder or hub name → model and tokenizer, ready to talk: an adapter on its base, or a whole model."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sft.config import RunConfig
from lora_sft.errors import ModelError
from lora_sft.model.base import BaseSpec, choose_base, choose_device, choose_dtype, load_base, read_config
from lora_sft.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Loaded:
    """A model with what it needs to talk.

    Attributes:
        model: in eval mode; a PeftModel if an adapter was loaded.
        tokenizer: with the chat template that was trained.
        base: how the base model was loaded.
        is_adapter: whether `model` is an adapter on a base.
    """

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    base: BaseSpec
    is_adapter: bool


def load_model(path: str | Path, device: str = "auto") -> Loaded:
    """An adapter folder is loaded on its base as it was trained; any other model in 16 bits (on the CPU in 32).

    Raises:
        ModelError: nothing there, or not a model.
    """
    if (Path(path) / "adapter_config.json").is_file():
        return _load_adapter(Path(path), device)
    spec = choose_base(RunConfig(model_name_or_path=str(path), load_in_4bit=False, device=device))  # type: ignore[arg-type]
    read_config(spec)
    return Loaded(load_base(spec).eval(), load_tokenizer(spec), spec, is_adapter=False)


def _load_adapter(folder: Path, device: str) -> Loaded:
    from transformers import AutoTokenizer, GenerationConfig

    spec = trained_base(folder, device)
    read_config(spec)
    base = load_base(spec)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = put_adapter(base, folder, len(tokenizer))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
        base.generation_config = model.generation_config
    return Loaded(model.eval(), tokenizer, spec, is_adapter=True)


def put_adapter(base: "PreTrainedModel", folder: Path, vocabulary_size: int) -> Any:
    """A base model and an adapter folder → PeftModel; the embeddings grow first if training had added tokens.

    Raises:
        ModelError: the adapter does not fit this base.
    """
    from peft import PeftModel

    if vocabulary_size > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(vocabulary_size)
    try:
        return PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: the adapter does not fit its base: {str(error).splitlines()[0]}") from None


def trained_base(folder: Path, device: str = "auto") -> BaseSpec:
    """How the base of an adapter was loaded in training, from `manifest.json`; for a foreign adapter the default.

    Raises:
        ModelError: the folder holds no adapter.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: no adapter here (no adapter_config.json)")
    device = choose_device(device)
    if (folder / MANIFEST).is_file():
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["base"]
        spec = BaseSpec(**{name: recorded[name] for name in BaseSpec.__dataclass_fields__})
        # An adapter trained on a GPU also talks on the CPU, where float16 has no kernels.
        dtype = "float32" if device == "cpu" and spec.dtype == "float16" else spec.dtype
        return replace(spec, device=device, dtype=dtype, attn_implementation=None)
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if not adapter.get("base_model_name_or_path"):
        raise ModelError(f"{folder}: adapter_config.json does not name the base model (base_model_name_or_path)")
    dtype, _ = choose_dtype(None, None, device)
    return BaseSpec(adapter["base_model_name_or_path"], adapter.get("revision"), dtype=dtype, device=device)
