"""A folder or hub name → model and tokenizer, ready to talk: an adapter on its base, or a whole model."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sft.config import RunConfig
from lora_sft.console import say
from lora_sft.errors import ModelError
from lora_sft.model.base import BaseSpec, choose_base, grow_vocabulary, load_base, read_config
from lora_sft.model.device import choose_device, choose_dtype
from lora_sft.model.foreign import (
    base_record,
    read_adapter_config,
    read_object,
    refuse_odd_weights,
    refuse_slow_patterns,
    wrong_parts,
)
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
        template_variables: those that the chat template was given in training.
        replies: which replies were learned and how they end: `turns`, `append_stop_token` and `allow` of the training.
    """

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    base: BaseSpec
    is_adapter: bool
    template_variables: dict[str, Any] = field(default_factory=dict)
    replies: dict[str, Any] = field(default_factory=dict)


def load_model(path: str | Path, device: str = "auto", trust_remote_code: bool = False) -> Loaded:
    """An adapter folder is loaded on its base as it was trained; any other model in 16 bits (on the CPU in 32).

    Raises:
        ModelError: nothing there, or not a model.
    """
    if (Path(path) / "adapter_config.json").is_file():
        spec = trained_base(Path(path), device, trust_remote_code)
        refuse_odd_weights(Path(path))
        loaded = load_adapter(Path(path), spec)
        for words in wrong_parts(Path(path), manifest_of(Path(path)), spec):
            say("warning", words)
        return loaded
    spec = choose_base(
        RunConfig(model_name_or_path=str(path), load_in_4bit=False, device=device, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    )
    read_config(spec)
    return Loaded(load_base(spec).eval(), load_tokenizer(spec), spec, is_adapter=False)


def load_adapter(folder: Path, spec: BaseSpec) -> Loaded:
    """An adapter folder on the base of `spec`; what lies in the folder (tokenizer, template, stop tokens) comes first.

    Raises:
        ModelError: the base cannot be had, or the adapter does not fit it.
    """
    from transformers import GenerationConfig

    read_config(spec)
    tokenizer = tokenizer_of(folder, spec)
    base = load_base(spec)
    model = put_adapter(base, folder, len(tokenizer))
    if (folder / "generation_config.json").is_file():
        try:
            base.generation_config = model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{folder}/generation_config.json: cannot be read: {_first_line(error)}") from None
    manifest = manifest_of(folder)
    variables, replies = manifest.get("chat_template_kwargs", {}), manifest.get("replies", {})
    return Loaded(model.eval(), tokenizer, spec, True, variables, replies)


def load_adapters(folders: Sequence[Path], spec: BaseSpec, weights: Sequence[float], vocabulary_size: int) -> Any:
    """Several adapters on one base, each with a weight; their updates add up → PeftModel in eval mode.

    Raises:
        ModelError: the base cannot be had, or an adapter does not fit it.
    """
    from peft.tuners.lora.layer import LoraLayer

    read_config(spec)
    model = put_adapter(load_base(spec), folders[0], vocabulary_size)
    names = ["default", *(f"adapter_{number}" for number in range(1, len(folders)))]
    for folder, name in zip(folders[1:], names[1:], strict=True):
        try:
            model.load_adapter(folder, name)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{folder}: the adapter does not fit its base: {str(error).splitlines()[0]}") from None
    if len(folders) > 1:
        model.base_model.set_adapter(names)
    for module in (one for one in model.modules() if isinstance(one, LoraLayer)):
        for name, weight in zip(names, weights, strict=True):
            if name in module.scaling:
                module.scaling[name] *= weight
    return model.eval()


def tokenizer_of(folder: Path, spec: BaseSpec) -> "PreTrainedTokenizerBase":
    """The tokenizer that lies with an adapter; else its base's.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    if (folder / "tokenizer_config.json").is_file():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=spec.trust_remote_code
            )
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"{folder}: has no tokenizer that can be read: {str(error).splitlines()[0]}") from None
        return tokenizer
    return load_tokenizer(spec)


def put_adapter(base: "PreTrainedModel", folder: Path, vocabulary_size: int) -> Any:
    """A base model and an adapter folder → PeftModel; the embeddings grow first if training had added tokens.

    Raises:
        ModelError: the adapter does not fit this base.
    """
    from peft import PeftModel

    names = [name for name, _ in (*base.named_modules(), *base.named_parameters())]
    refuse_slow_patterns(read_adapter_config(folder), names, str(folder / "adapter_config.json"))
    grow_vocabulary(base, vocabulary_size)
    try:
        with warnings.catch_warnings():
            # PEFT loads an adapter of another model in silence, but for this.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, UserWarning) as error:
        raise ModelError(f"{folder}: the adapter does not fit its base: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def trained_base(
    folder: Path, device: str = "auto", trust_remote_code: bool = False, as_recorded: bool = False
) -> BaseSpec:
    """How the base of an adapter was loaded in training, from `manifest.json`; for a foreign adapter the default.

    Whether code that comes with the base may run is never read from the adapter: whoever loads it says so.

    Args:
        as_recorded: the dtype of the training also where this device cannot compute in it.

    Raises:
        ModelError: the folder holds no adapter.
    """
    adapter = read_adapter_config(folder)
    device = choose_device(device)
    if (recorded := manifest_of(folder).get("base")) is not None:
        spec = _recorded_spec(recorded, folder)
        # An adapter trained on a GPU also talks on the CPU, where float16 lacks kernels.
        lacks_kernels = device == "cpu" and spec.dtype == "float16" and not as_recorded
        dtype = "float32" if lacks_kernels else spec.dtype
        revision = recorded.get("commit") or spec.revision
        named = adapter.get("base_model_name_or_path")
        if named and named != spec.name:
            then, there = recorded.get("fingerprint"), replace(spec, name=named, revision=adapter.get("revision"))
            if then and not Path(named).expanduser().is_dir() and base_record(there) != then:
                raise ModelError(
                    f"{folder}: adapter_config.json names the base {named}, manifest.json {spec.name}; the first is "
                    "neither here nor fetched, since the adapter was not trained on it; mend base_model_name_or_path"
                )
            say("base", f"{named}, as adapter_config.json says; it was trained on {spec.name}")
            spec, revision = replace(spec, name=named), None
        return replace(
            spec,
            revision=revision,
            device=device,
            dtype=dtype,
            attn_implementation=None,
            trust_remote_code=trust_remote_code,
        )
    if not adapter.get("base_model_name_or_path"):
        raise ModelError(f"{folder}: adapter_config.json does not name the base model (base_model_name_or_path)")
    dtype, _ = choose_dtype(None, None, device)
    name, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    return BaseSpec(name, revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def recorded_quantization(folder: Path) -> dict[str, Any]:
    """What the manifest of an adapter says of its base's quantized weights; empty if it says nothing."""
    found: dict[str, Any] = manifest_of(folder).get("quantization", {})
    return found


def _recorded_spec(recorded: Any, folder: Path) -> BaseSpec:
    """What a manifest says of the base; it comes with the adapter, so it is not believed blindly."""
    fields: dict[str, Any] = (
        {name: recorded.get(name) for name in BaseSpec.__dataclass_fields__} if isinstance(recorded, dict) else {}
    )
    accepted = (
        isinstance(fields.get("name"), str)
        and isinstance(fields["revision"], str | None)
        and fields["quantization"] in (None, "nf4", "fp4", "int8")
        and fields["dtype"] in ("bfloat16", "float16", "float32")
        and isinstance(fields["double_quant"], bool)
    )
    if not accepted:
        raise ModelError(
            f"{folder / MANIFEST}: does not tell how the base was loaded; leave it out for a foreign adapter"
        )
    return BaseSpec(**fields)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The record of the run that made an adapter; empty for one that was trained elsewhere."""
    file = folder / MANIFEST
    return read_object(file, "record") if file.is_file() else {}
