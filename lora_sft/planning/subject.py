"""A model's configuration and the settings → the model that will be trained, without storage, with its fast parts."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_sft.config import RunConfig
from lora_sft.kernels.attention import takes_documents
from lora_sft.kernels.standing import standing_for
from lora_sft.kernels.swap import Part, Swaps
from lora_sft.model.adapter import build_model, cast_matrices, check_targets, lora_config
from lora_sft.model.base import BaseSpec, choose_base, name_base, read_config, skeleton, with_precision
from lora_sft.model.outline import outline
from lora_sft.planning.devices import Device
from lora_sft.planning.simulation import Simulation
from lora_sft.planning.ways import Ways, autocast_without_storage
from lora_sft.training.fast import PARTS
from lora_sft.training.job import spec_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lora_sft.model.tokenizer import Speech
    from lora_sft.training.job import Job


@dataclass(frozen=True)
class Blueprint:
    """What decides the shapes of a run.

    Attributes:
        shape: the model's configuration.
        spec: how the base will be loaded.
        config: every setting.
        tokens: that the tokenizer knows; None: as many as the model.
        new_token_ids: rows of the embeddings that are trained.
    """

    shape: "PretrainedConfig"
    spec: BaseSpec
    config: RunConfig
    tokens: int | None = None
    new_token_ids: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        """Of the model."""
        return int(self.shape.get_text_config().num_hidden_layers)

    @property
    def period(self) -> int:
        """After so many layers their kinds repeat; all of them where they do not."""
        kinds = getattr(self.shape.get_text_config(), "layer_types", None) or [None] * self.layers
        fitting = (n for n in range(1, self.layers) if all(kinds[i] == kinds[i % n] for i in range(self.layers)))
        return next(fitting, self.layers)

    def with_layers(self, layers: int) -> "Blueprint":
        """The same for a model of so many layers."""
        shape = copy.deepcopy(self.shape)
        text = shape.get_text_config()
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == self.layers:
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
        return Blueprint(shape, self.spec, self.config, self.tokens, self.new_token_ids)


def blueprint_of(
    config: RunConfig, device: Device, speech: "Speech | None" = None, given_model: Any = None
) -> Blueprint:
    """The blueprint of a run on that device, from the model's `config.json` alone.

    Args:
        speech: where a tokenizer is at hand: its new tokens are trained.
        given_model: one that was given loaded.

    Raises:
        ModelError: there is no such model, or the adapter's settings do not fit it.
    """
    if given_model is not None:
        spec = spec_of(given_model, config)
        return _blueprint(_unquantized(given_model.config), spec, config, speech)
    if device.is_here:
        spec = choose_base(config)
    else:
        usual = str(device.dtype).removeprefix("torch.")
        asked = "bfloat16" if config.bf16 else "float16" if config.fp16 else usual
        plain = (config.bf16 is False or config.fp16 is False) and not (config.bf16 or config.fp16)
        spec = with_precision(name_base(config), config, "float32" if plain else asked, device.kind)
    shape = read_config(spec, needs_weights=False)
    check_targets(config, skeleton(shape, spec))
    return _blueprint(shape, spec, config, speech)


def _blueprint(shape: "PretrainedConfig", spec: BaseSpec, config: RunConfig, speech: "Speech | None") -> Blueprint:
    if speech is None:
        return Blueprint(shape, spec, config)
    return Blueprint(shape, spec, config, len(speech.tokenizer), tuple(speech.new_token_ids))


def _unquantized(shape: "PretrainedConfig") -> "PretrainedConfig":
    """A configuration without what says how the weights are stored: that is in the spec."""
    found = copy.deepcopy(shape)
    if hasattr(found, "quantization_config"):
        del found.quantization_config
    return found


def blueprint_of_job(job: "Job", given_model: Any = None) -> Blueprint:
    """The blueprint of a run that is prepared.

    Args:
        given_model: a model that was given loaded.
    """
    shape = read_config(job.spec) if given_model is None else _unquantized(given_model.config)
    return _blueprint(shape, job.spec, job.config, job.speech)


@dataclass(frozen=True)
class Subject:
    """A model to simulate a step with.

    Attributes:
        model: with its adapter, on the `meta` device.
        parts: what became of the fast parts.
        one_row: whether the examples of a micro-batch are laid end to end, as far as its attention allows it.
    """

    model: Any
    parts: tuple[Part, ...]
    one_row: bool


def subject_of(plan: Blueprint, device: Device) -> Subject:
    """The model of a blueprint, as `training.run` would make it on that device.

    The fast parts are proven as ever, on numbers of the CPU, but for what only the real weights can show: that
    documents stay apart and that the whole step is the plain model's. A run proves both before its first step.
    """
    with standing_for(device.stand_in):
        base = outline(plan.shape, plan.spec)
        lora = lora_config(plan.config, plan.new_token_ids, base)
        lora.init_lora_weights = True  # other starts compute on weights, and have the same shapes
        model = build_model(base, lora, plan.config.seed, plan.tokens)
        if plan.config.adapter_dtype == "bfloat16":
            cast_matrices(model)
        parts: tuple[Part, ...] = ()
        if plan.config.fast_kernels:
            with autocast_without_storage(), Ways(device.stand_in), Simulation(device.stand_in):
                parts = tuple(swap(model, Swaps()) for swap in PARTS)
    implementation = str(getattr(model.config, "_attn_implementation", ""))
    return Subject(model, parts, takes_documents(model) or "flash" in implementation)
