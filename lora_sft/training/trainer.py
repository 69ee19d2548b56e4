"""Model, examples and settings → a trained adapter. The only file that touches TRL."""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from lora_sft.chat.labels import Example
from lora_sft.config import RunConfig
from lora_sft.errors import RunError, SettingError
from lora_sft.model.tokenizer import Speech
from lora_sft.training.loss import Loss, forward_loss
from lora_sft.training.progress import Listener, Reporter

# transformers 5.23 renamed the argument and warns at the old name; remove the choice when transformers >= 6.
_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in SFTConfig.__dataclass_fields__
    else "gradient_checkpointing"
)


class Tally:
    """Sums over micro-batches, kept on the device so that counting never waits for it."""

    def __init__(self) -> None:
        self.nll: Tensor | float = 0.0
        self.correct: Tensor | int = 0
        self.supervised: Tensor | int = 0
        self.tokens: Tensor | int = 0

    def add(self, loss: Loss, tokens: Tensor) -> None:
        """Adds one micro-batch; `tokens` is its count of all tokens but padding."""
        self.nll = self.nll + loss.nll
        self.correct = self.correct + loss.correct
        self.supervised = self.supervised + loss.tokens
        self.tokens = self.tokens + tokens


class Trainer(SFTTrainer):
    """TRL's trainer with our loss, exact means over tokens, float32 adapters, and no telemetry."""

    # `compute_loss` divides by the supervised tokens of the whole step, so nothing is left to scale.
    loss_is_scaled_for_ga = True
    optimizer: Any

    def __init__(self, *args: Any, loraplus_lr_ratio: float | None = None, **kwargs: Any) -> None:
        self._loraplus_lr_ratio = loraplus_lr_ratio
        self._tallies = {"train": Tally(), "eval": Tally()}
        self.tokens_seen = self.supervised_tokens_seen = 0
        self.nll_seen = 0.0
        model = kwargs["model"]
        trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        super().__init__(*args, **kwargs)
        # TRL 1.16 casts the adapter of a quantized model to bfloat16, in which small updates are rounded away and a
        # resumed run differs. Remove when TRL leaves the dtype alone (huggingface/peft#2889).
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.data = trained[name]
        # The supervised tokens of a whole step are counted for every model, not only those that take the count.
        self.model_accepts_loss_kwargs = True

    def _send_telemetry(self) -> None:
        """TRL's, only where the user turned it on: huggingface_hub may have been imported before us."""
        if os.environ["HF_HUB_DISABLE_TELEMETRY"].lower() in ("0", "false", "no", "off"):
            super()._send_telemetry()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """We write our own at the end; TRL's says "fine-tuned version of [None]"."""

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer of the settings; with LoRA+ the B matrices have a learning rate of their own."""
        if self._loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        learning_rate = options.pop("lr")
        self.optimizer = create_loraplus_optimizer(
            self.model,
            optimizer_class,
            lr=learning_rate,
            loraplus_lr_ratio=self._loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, divided by the supervised tokens of the whole optimizer step."""
        mode = "train" if self.model.training else "eval"
        loss, output = forward_loss(model, inputs, num_items_in_batch)
        self._tallies[mode].add(loss, inputs["attention_mask"].sum())
        value = loss.value
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DDP averages the gradients of the ranks, and the count is of all of them together.
            value = value * self.accelerator.num_processes
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            value = value + self.router_aux_loss_coef * output.aux_loss / steps  # type: ignore[attr-defined]
        return (value, output) if return_outputs else value

    def _take(self, mode: str) -> dict[str, float]:
        """Empties a tally → sums over all ranks."""
        tally, self._tallies[mode] = self._tallies[mode], Tally()
        sums = torch.tensor([float(tally.nll), float(tally.correct), float(tally.supervised), float(tally.tokens)])
        total = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        return dict(zip(("nll", "correct", "supervised", "tokens"), total, strict=True))

    def count_seen(self) -> dict[str, float]:
        """Sums over what was trained on since the last call, also added to the totals of the run."""
        seen = self._take("train")
        self.tokens_seen += int(seen["tokens"])
        self.supervised_tokens_seen += int(seen["supervised"])
        self.nll_seen += seen["nll"]
        return seen

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds token accuracy and the token counts to what the trainer logs."""
        if "loss" in logs:
            seen = self.count_seen()
            if not math.isfinite(seen["nll"]):
                raise RunError(
                    f"the loss is {seen['nll']} at step {self.state.global_step}: lower learning_rate, or look for "
                    "NaN in the base model"
                )
            logs["loss"] = seen["nll"] / max(seen["supervised"], 1)
            logs["mean_token_accuracy"] = seen["correct"] / max(seen["supervised"], 1)
            logs["num_tokens"] = self.tokens_seen
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The evaluation with means over tokens; transformers' own weighs a short row like a long one."""
        self._tallies["eval"] = Tally()
        output = super().evaluation_loop(*args, **kwargs)
        seen = self._take("eval")
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = seen["nll"] / max(seen["supervised"], 1)
        output.metrics[f"{prefix}_mean_token_accuracy"] = seen["correct"] / max(seen["supervised"], 1)
        return output


def build_trainer(
    model: Any,
    speech: Speech,
    examples: Sequence[Example],
    eval_examples: Sequence[Example],
    config: RunConfig,
    arguments: TrainingArguments,
    listeners: Sequence[Listener],
) -> Trainer:
    """A trainer that is ready to `train()`; `arguments` are those that `training_arguments` made of `config`."""
    callbacks: list[Any] = [Reporter(listeners)]
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_table(examples),
        eval_dataset=_table(eval_examples) if eval_examples else None,
        processing_class=speech.tokenizer,
        callbacks=callbacks,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _table(examples: Sequence[Example]) -> Dataset:
    return Dataset.from_dict({"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]})


def training_arguments(config: RunConfig, device: str, dtype: str, has_eval_data: bool) -> SFTConfig:
    """Our settings → TRL's SFTConfig.

    Args:
        device: `cpu` or `cuda:N`.
        dtype: of the arithmetic; 16-bit ones run under autocast, with the adapter in float32.

    Raises:
        SettingError: transformers or TRL does not accept a value.
    """
    on_gpu = device != "cpu"
    checkpointing = on_gpu if config.gradient_checkpointing is None else config.gradient_checkpointing
    strategy = config.eval_strategy or ("epoch" if has_eval_data else "no")
    if strategy != "no" and not has_eval_data:
        raise SettingError(f"eval_strategy {strategy} needs evaluation data: give eval_dataset or eval_size")
    given = dict(
        output_dir=config.output_dir,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size or config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio if config.warmup_steps is None else config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        **{_CHECKPOINTING: checkpointing},
        neftune_noise_alpha=config.neftune_noise_alpha,
        train_sampling_strategy=config.train_sampling_strategy,
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy=strategy,
        eval_steps=config.eval_steps,
        save_strategy=config.save_strategy,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        load_best_model_at_end=config.load_best_model_at_end,
        metric_for_best_model=config.metric_for_best_model if config.load_best_model_at_end else None,
        report_to=config.report_to,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        max_length=None,  # our examples are as long as they should be
        router_aux_loss_coef=0.0,
    )
    try:
        arguments = SFTConfig(**(given | config.training_args))
    except (TypeError, ValueError, ImportError) as error:
        raise SettingError(f"the training settings do not go together: {error}") from None
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process uses one GPU; several GPUs are used through `accelerate launch`
    return arguments
