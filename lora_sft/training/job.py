"""Settings → all that is known of a run before a weight is read. Whatever can be wrong is found here."""

import hashlib
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_sft.chat.labels import Example
from lora_sft.config import RunConfig
from lora_sft.console import say
from lora_sft.data.intake import Intake
from lora_sft.errors import DataError, ModelError
from lora_sft.model.adapter import build_model, check_targets, count_parameters, lora_config
from lora_sft.model.base import (
    BaseSpec,
    choose_base,
    input_widths,
    name_base,
    read_config,
    refuse_odd_widths,
    skeleton,
)
from lora_sft.model.device import choose_device
from lora_sft.model.tokenizer import Speech, load_tokenizer, prepare_speech, read_generation_config
from lora_sft.preparation.dataset import read_data
from lora_sft.preparation.prepare import Prepared
from lora_sft.training.batching import Batching, BatchPlan, plan_batches
from lora_sft.training.trainer import training_arguments

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


@dataclass(frozen=True)
class Job:
    """A run, ready to start.

    Attributes:
        config: every setting.
        spec: how the base will be loaded.
        speech: tokenizer, template, stop tokens.
        train, evaluation: the examples; `evaluation` is None if nothing is evaluated during training.
        lora: the adapter, checked against the model's shape.
        arguments: the trainer's.
        trained_parameters: how many there will be; 0 if the model was given loaded.
        intake: the account of the rows that were read.
        batching: how micro-batches are made.
    """

    config: RunConfig
    spec: BaseSpec
    speech: Speech
    train: Prepared
    evaluation: Prepared | None
    lora: "LoraConfig"
    arguments: "TrainingArguments"
    trained_parameters: int
    intake: Intake
    batching: Batching

    @cached_property
    def plan(self) -> BatchPlan:
        """The micro-batches of the first epoch; every epoch has as many."""
        return plan_batches(self.train.examples.lengths, self.batching)

    @cached_property
    def data_hash(self) -> str:
        """A hash of the tokens and labels that are trained on, in order."""
        return hash_of(self.train.examples)

    @cached_property
    def evaluation_hash(self) -> str | None:
        """The same of those that are evaluated on; None if there are none."""
        return hash_of(self.evaluation.examples) if self.evaluation else None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.config.max_steps > 0:
            return self.config.max_steps
        steps = self.plan.steps_of_an_epoch(self.config.gradient_accumulation_steps)
        return math.ceil(self.config.num_train_epochs * steps)

    def begin_warmup(self) -> None:
        """Sets the warm-up of the trainer's arguments, of as many steps as there are."""
        if self.config.warmup_steps is None:
            # Rounded down: the first step of a warm-up has a learning rate of 0, and a short run has none to spare.
            self.arguments.warmup_steps = int(self.config.warmup_ratio * self.total_steps)

    @property
    def output_bytes(self) -> int:
        """What adapter and checkpoints take on disk: float32 weights, and with each checkpoint two AdamW moments."""
        kept = 0 if self.config.save_strategy == "no" else (self.config.save_total_limit or 10) + 1
        return 4 * self.trained_parameters * (1 + 3 * kept)


def hash_of(examples: Iterable[Example]) -> str:
    """A hash of the tokens and labels of examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(array("q", example.input_ids).tobytes())
        digest.update(array("q", example.labels).tobytes())
    return digest.hexdigest()


def make_job(
    config: RunConfig,
    dataset: Any = None,
    eval_dataset: Any = None,
    model: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Job:
    """Settings, and what was given as objects instead of names → Job.

    Raises:
        UsageError: a setting, the data, the template or the model is wrong.
    """
    spec = choose_base(config) if model is None else spec_of(model, config)
    shape = skeleton(read_config(spec), spec) if model is None else model
    check_targets(config, shape)
    refuse_odd_widths(input_widths(shape), spec)
    speech = load_speech(config, tokenizer, model)
    lora = lora_config(config, speech.new_token_ids, shape)
    trained = _rehearse(lora, shape, speech) if model is None else 0
    data = read_data(config, speech, dataset, eval_dataset)
    train, evaluation = data.train, data.evaluation
    check_positions(shape.config, max(part.longest for part in (train, evaluation) if part))
    arguments = training_arguments(config, spec.device, spec.dtype, evaluation is not None)
    job = Job(
        config,
        spec,
        speech,
        train,
        evaluation,
        lora,
        arguments,
        trained,
        data.intake,
        Batching.of(config, int(arguments.world_size)),
    )
    job.begin_warmup()
    return job


def with_settings(job: Job, **changes: Any) -> Job:
    """The job with other settings of the training."""
    config = job.config.model_copy(update=changes)
    arguments = training_arguments(config, job.spec.device, job.spec.dtype, job.evaluation is not None)
    changed = replace(job, config=config, arguments=arguments, batching=Batching.of(config, int(arguments.world_size)))
    changed.begin_warmup()
    return changed


def load_speech(
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    given_model: "PreTrainedModel | None" = None,
) -> Speech:
    """Settings → tokenizer, template and stop tokens, without weights.

    Args:
        tokenizer: instead of the model's own.
        given_model: one that was given loaded.

    Raises:
        ModelError: no tokenizer there.
        TemplateError: no template that fits.
    """
    spec = name_base(config) if given_model is None else BaseSpec(_name_of(given_model, config))
    tokenizer = load_tokenizer(spec) if tokenizer is None else tokenizer
    stops = read_generation_config(spec) if given_model is None else given_model.generation_config
    return prepare_speech(tokenizer, stops, config.chat_template, config.new_tokens, config.chat_template_dir)


def _rehearse(lora: "LoraConfig", shape: "PreTrainedModel", speech: Speech) -> int:
    """Attaches the adapter to the model without storage: what PEFT would refuse, it refuses now.

    Returns:
        How many parameters will be trained.
    """
    import copy

    rows, tokens = shape.get_input_embeddings().num_embeddings, len(speech.tokenizer)
    if tokens - len(speech.new_token_ids) > rows:
        raise ModelError(f"the tokenizer knows {tokens} tokens, the model embeds {rows}: they do not belong together")
    rehearsal = copy.deepcopy(lora)
    rehearsal.init_lora_weights = True  # the other starts compute on weights, and there are none
    return count_parameters(build_model(shape, rehearsal, 0, tokens))[0]


def spec_of(model: "PreTrainedModel", config: RunConfig) -> BaseSpec:
    """A model that was given loaded → how it was loaded; one on the CPU is moved to the GPU that is asked for.

    Raises:
        ModelError: the settings ask for another quantization or device than the model has.
    """
    method = getattr(model.config, "quantization_config", None)
    quantization = None
    if method is not None:
        quantization = (
            "int8" if getattr(method, "load_in_8bit", False) else getattr(method, "bnb_4bit_quant_type", None)
        )
    if (config.load_in_4bit and quantization not in ("nf4", "fp4")) or (config.load_in_8bit and quantization != "int8"):
        raise ModelError("a model that is given loaded cannot be quantized any more; give its folder or hub name")
    if config.start_needs_whole_base and quantization:
        raise ModelError(f"lora_init {config.lora_init} needs an unquantized base, and this one is {quantization}")
    device = choose_device(config.device)
    if model.device.type != device.partition(":")[0]:
        if quantization:
            raise ModelError(f"the model is quantized on {model.device}, and cannot be moved to {device}")
        model.to(device)
    dtype = str(model.dtype).removeprefix("torch.")
    dtype = "bfloat16" if config.bf16 else "float16" if config.fp16 else dtype
    say("base", f"as given: {dtype}{f', {quantization}' if quantization else ''}, on {device}")
    return BaseSpec(
        name=_name_of(model, config),
        quantization=quantization,
        double_quant=bool(getattr(method, "bnb_4bit_use_double_quant", False)),
        dtype=dtype,
        device=device,
    )


def _name_of(model: "PreTrainedModel", config: RunConfig) -> str:
    return str(model.name_or_path or config.model_name_or_path or "")


def check_positions(shape: "PretrainedConfig", longest: int) -> None:
    """Raises DataError if the longest example, in tokens, has more than the model has positions."""
    positions = getattr(shape.get_text_config(), "max_position_embeddings", None)
    if positions and longest > positions:
        raise DataError(f"the longest example has {longest} tokens, the model {positions} positions; lower max_length")
