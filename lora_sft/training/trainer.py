"""Model, examples and settings → a trained adapter. The only file that touches TRL."""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from lora_sft.chat.labels import Example
from lora_sft.config import RunConfig
from lora_sft.errors import RunError, SettingError
from lora_sft.kernels.swap import Swaps
from lora_sft.model.adapter import train_in
from lora_sft.model.tokenizer import Speech
from lora_sft.training.batching import Batching, Lengths
from lora_sft.training.evaluation import Sums, sum_up
from lora_sft.training.guarding import TOKENS, Guarding
from lora_sft.training.isolation import settle
from lora_sft.training.loader import Collator, MicroBatches, MicroBatchLoader, Rows
from lora_sft.training.loss import forward_loss
from lora_sft.training.progress import Listener, Reporter
from lora_sft.training.recompute import largest_batch, recompute
from lora_sft.training.resuming import Resuming
from lora_sft.training.splitting import Splitting
from lora_sft.training.tally import Seen, Tally

# transformers 5.23 renamed the argument and warns at the old name; remove the choice when transformers >= 6.
_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in SFTConfig.__dataclass_fields__
    else "gradient_checkpointing"
)


class Trainer(Guarding, Splitting, Resuming, SFTTrainer):
    """TRL's trainer with our batches and loss, exact means over tokens, float32 adapters, and no telemetry."""

    # `compute_loss` divides by the supervised tokens of the whole step, so nothing is left to scale.
    loss_is_scaled_for_ga = True
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        examples: Sequence[Example],
        lengths: Lengths,
        batching: Batching,
        eval_examples: Sequence[Example] = (),
        loraplus_lr_ratio: float | None = None,
        label_smoothing: float = 0.0,
        keep_checkpoints: int | None = None,
        new_schedule: bool = False,
        **kwargs: Any,
    ) -> None:
        self._examples, self._lengths, self._batching = examples, lengths, batching
        self._eval_examples = eval_examples
        self._loraplus_lr_ratio, self.label_smoothing = loraplus_lr_ratio, label_smoothing
        self._tally = Tally()
        self.seen = Seen()
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
        self.prepare_checkpoints(keep_checkpoints, new_schedule)

    def _send_telemetry(self) -> None:
        """TRL's, only where the user turned it on: huggingface_hub may have been imported before us."""
        if os.environ["HF_HUB_DISABLE_TELEMETRY"].lower() in ("0", "false", "no", "off"):
            super()._send_telemetry()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """We write our own at the end; TRL's says "fine-tuned version of [None]"."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Our micro-batches; examples are read when they are needed.

        accelerate does not wrap it: its sharding of batches repeats rows to make them even, and loses the epoch in a
        resumed run. transformers moves the tensors to the device.
        """
        workers = self.args.dataloader_num_workers
        return MicroBatchLoader(
            Rows(self._examples),  # type: ignore[arg-type]
            batch_sampler=MicroBatches(self._lengths, self.batching_now, self.args.process_index),
            collate_fn=self._collator(),
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _collator(self) -> Collator:
        return Collator(self.batching_now, self.processing_class.pad_token_id)

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Examples → the tensors of a micro-batch."""
        return self._collator()(examples)

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
        batch = {name: value for name, value in inputs.items() if name != TOKENS}
        loss, output = forward_loss(model, batch, num_items_in_batch, self.label_smoothing)
        self._tally.add(loss, inputs[TOKENS])
        value = loss.value
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DDP averages the gradients of the ranks, and the count is of all of them together.
            value = value * self.accelerator.num_processes
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            value = value + self.router_aux_loss_coef * output.aux_loss * self.share / steps  # type: ignore[attr-defined]
        if self.watch is not None:
            of_step = 1 if num_items_in_batch is None else num_items_in_batch
            self.watch.add(value, loss.value * of_step / loss.tokens.clamp(min=1))
        return (value, output) if return_outputs else value

    def _over_all_ranks(self, *sums: Tensor | float) -> list[float]:
        """Sums of this process → sums of all of them."""
        here = torch.tensor([float(value) for value in sums], device=self.args.device)
        return self.accelerator.reduce(here, "sum").tolist()  # type: ignore[no-any-return]

    def count_seen(self) -> Seen:
        """What was trained on since the last call; it is also added to `seen`, the whole of the run.

        Raises:
            RunError: the loss is not a number.
        """
        tally, self._tally = self._tally, Tally()
        nll, correct, supervised, tokens, entropy = self._over_all_ranks(
            tally.nll, tally.correct, tally.supervised, tally.tokens, tally.entropy
        )
        if not math.isfinite(nll):
            raise RunError(
                f"the loss is {nll} at step {self.state.global_step}: lower learning_rate, or look for NaN in the base"
            )
        now = Seen(nll, int(correct), int(supervised), int(tokens), entropy)
        self.seen = self.seen.plus(now)
        return now

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replaces the loss by the exact mean over tokens; adds token accuracy, entropy and the totals of the run."""
        if "loss" in logs:
            now = self.count_seen()
            logs["loss"] = now.loss
            logs["mean_token_accuracy"] = now.correct / max(now.supervised, 1)
            if math.isfinite(now.entropy):
                logs["entropy"] = now.entropy / max(now.supervised, 1)
            logs["num_tokens"] = self.seen.tokens
            logs["num_supervised_tokens"] = self.seen.supervised
            logs["train_loss"] = self.seen.loss
        super().log(logs, start_time)

    def totals(self) -> dict[str, Any]:
        """What was counted so far: the whole run, and this process since the last log."""
        return {"seen": list(self.seen), "tally": vars(self._tally), "split": self.split_micro_batches}

    def take_totals(self, totals: dict[str, Any]) -> None:
        """Goes on counting from `totals`."""
        self.seen, self.split_micro_batches = Seen(*totals["seen"]), totals.get("split", 0)
        self._tally = Tally()
        for name, value in totals["tally"].items():
            setattr(self._tally, name, value.to(self.args.device) if isinstance(value, Tensor) else value)

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The evaluation with means over tokens, each row once.

        transformers' own weighs a short row like a long one, and with several processes counts some rows twice.
        """
        nll, correct, tokens = self._over_all_ranks(*self._sum_up(self._mine_of_evaluation()))
        metrics = {
            f"{metric_key_prefix}_loss": nll / max(tokens, 1),
            f"{metric_key_prefix}_mean_token_accuracy": correct / max(tokens, 1),
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self._eval_examples))

    def _mine_of_evaluation(self) -> Sequence[int]:
        """The rows that this process evaluates on."""
        return range(self.accelerator.process_index, len(self._eval_examples), self.accelerator.num_processes)

    def _sum_up(self, rows: Sequence[int]) -> Sums:
        """Sums over rows of the evaluation data; a batch size that is found too large is smaller from then on."""

        def shrink(size: int) -> None:
            self.args.per_device_eval_batch_size = size

        pad_token_id, size = self.processing_class.pad_token_id, self.args.per_device_eval_batch_size
        with self.compute_loss_context_manager():
            return sum_up(self.model, self._eval_examples, pad_token_id, size, rows, shrink)

    def try_evaluation(self) -> None:
        """Runs the largest evaluation batch, if there will be an evaluation."""
        rows, size = self._mine_of_evaluation(), self.args.per_device_eval_batch_size
        if not rows or self.args.eval_strategy == "no":
            return
        lengths = [len(example.input_ids) for example in Rows(self._eval_examples)]
        some = (rows[start : start + size] for start in range(0, len(rows), size))
        self._sum_up(max(some, key=lambda batch: len(batch) * max(lengths[row] for row in batch)))


def build_trainer(
    model: Any,
    speech: Speech,
    examples: Sequence[Example],
    eval_examples: Sequence[Example],
    config: RunConfig,
    arguments: TrainingArguments,
    listeners: Sequence[Listener],
    lengths: Lengths | None = None,
    batching: Batching | None = None,
    swaps: Swaps | None = None,
) -> Trainer:
    """A trainer that is ready to `train()`.

    Args:
        examples: read one by one, when they are needed.
        arguments: those that `training_arguments` made of `config`.
        lengths: tokens of each example; None counts them.
        batching: how micro-batches are made, as `choose_batching` found it for this model; None asks it.
        swaps: gets the forwards of the layers that are recomputed; to be undone after training.
    """
    callbacks: list[Any] = [Reporter(listeners)]
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    batching = choose_batching(model, config, arguments) if batching is None else batching
    train_in(model, config.adapter_dtype, config.learning_rate)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_first_row(examples),
        eval_dataset=_first_row(eval_examples) if len(eval_examples) else None,
        examples=examples,
        lengths=[len(example.input_ids) for example in examples] if lengths is None else lengths,
        batching=batching,
        eval_examples=eval_examples,
        processing_class=speech.tokenizer,
        callbacks=callbacks,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        label_smoothing=config.label_smoothing,
        keep_checkpoints=config.save_total_limit,
        new_schedule=bool(config.resume_with_changed),
    )
    trainer.remove_callback(PrinterCallback)
    swaps = Swaps() if swaps is None else swaps
    trainer.guard(config, swaps)

    def run_largest() -> Tensor:
        rows = largest_batch(trainer._lengths, batching)
        with _arithmetic(model, arguments):
            return trainer.loss_of(trainer.collate([examples[index] for index in rows]), None)

    recompute(model, config.gradient_checkpointing, run_largest, swaps, lambda here: gather_object([here]))
    return trainer


def choose_batching(model: Any, config: RunConfig, arguments: TrainingArguments) -> Batching:
    """What the settings ask for; packing only if it is proven on this model, in the arithmetic of the training."""
    with _arithmetic(model, arguments):
        return settle(Batching.of(config, int(arguments.world_size)), model)


def _arithmetic(model: Any, arguments: TrainingArguments) -> Any:
    """The autocast of the training, in which accelerate runs the model once it trains."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16
    return torch.autocast(model.device.type, dtype, enabled=bool(arguments.bf16 or arguments.fp16))


def _first_row(examples: Sequence[Example]) -> Dataset:
    """TRL asks for a `datasets.Dataset` and looks at its first row; what is trained on comes from `examples`."""
    return Dataset.from_list([{"input_ids": examples[0].input_ids, "labels": examples[0].labels}])


def training_arguments(config: RunConfig, device: str, dtype: str, has_eval_data: bool) -> SFTConfig:
    """Our settings → TRL's SFTConfig.

    Args:
        device: `cpu` or `cuda:N`.
        dtype: of the arithmetic; 16-bit ones run under autocast, with the adapter in float32.

    Raises:
        SettingError: transformers or TRL does not accept a value.
    """
    on_gpu = device != "cpu"
    if config.adapter_dtype == "bfloat16" and dtype != "bfloat16":
        raise SettingError(
            f"adapter_dtype: bfloat16 would round the products of the adapter in a run in {dtype}; set bf16: true, or "
            "adapter_dtype: float32"
        )
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
        # `recompute` does it: TRL's makes the embeddings' output require a gradient, which then is computed for nobody.
        **{_CHECKPOINTING: False},
        neftune_noise_alpha=config.neftune_noise_alpha,
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy=strategy,
        eval_steps=config.eval_steps,
        save_strategy=config.save_strategy,
        save_steps=config.save_steps,
        save_total_limit=None,  # transformers would remove whatever is called like a checkpoint; ours are counted by us
        load_best_model_at_end=config.load_best_model_at_end,
        metric_for_best_model=config.metric_for_best_model if config.load_best_model_at_end else None,
        report_to=config.report_to,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        max_length=None,  # our examples are as long as they should be
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,
    )
    try:
        arguments = SFTConfig(**(given | config.training_args))
    except (TypeError, ValueError, ImportError) as error:
        raise SettingError(f"the training settings do not go together: {error}") from None
    missing = set(arguments.report_to) - set(get_available_reporting_integrations())
    if missing:
        raise SettingError(f"report_to: {', '.join(sorted(missing))} is not installed; `pip install` it, or use none")
    if arguments.save_only_model:
        raise SettingError("save_only_model: such checkpoints could not be resumed; set save_strategy: no")
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process uses one GPU; several GPUs are used through `accelerate launch`
    return arguments
