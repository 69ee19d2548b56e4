"""One side of a race, in a process of its own: a training that stops before every step until it is told to go on.

`python -m bench.training.worker SIDE.json FOLDER` says `{"ready": …}` on standard output when the first step could
begin, then does one step for every line that it reads, and says what the step took. What the libraries print goes to
standard error. Every side gets rows that are tokens and labels already, and the same adapter to begin with.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from bench.training.meter import Meter
from bench.training.side import Side

LEARNING_RATE = 2e-4


class Turns:
    """Lets a training go on step by step, and reports each; the listener of our run, and what a TRL callback calls."""

    def __init__(self, device: str, said: TextIO) -> None:
        self.meter, self.said = Meter(device), said
        self.taken: dict[str, Any] = {}
        self.seen = (0, 0)

    def started(self, total_steps: int, first_step: int) -> None:
        """The training is about to begin its first step."""
        self._say({"ready": {"steps": total_steps, "held_bytes": self.meter.held_bytes()}})
        self._wait()

    def stepped(self, step: int) -> None:
        """The optimizer has stepped."""
        seconds, peak = self.meter.read()
        self.taken = {"seconds": seconds, "peak_bytes": peak}

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        """The loss of the step is known; our runs count their tokens too."""
        if "loss" not in metrics or not self.taken:
            return
        now = (int(metrics.get("num_supervised_tokens", 0)), int(metrics.get("num_tokens", 0)))
        self.finished(metrics["loss"], now[0] - self.seen[0], now[1] - self.seen[1])
        self.seen = now

    def finished(self, loss: float, supervised: int, tokens: int) -> None:
        """Reports the step, and waits for the next one."""
        self._say({"step": {**self.taken, "loss": float(loss), "supervised": supervised, "tokens": tokens}})
        self.taken = {}
        self._wait()

    def ended(self) -> None:
        """Nothing to do."""

    def _say(self, line: dict[str, Any]) -> None:
        self.said.write(json.dumps(line) + "\n")
        self.said.flush()

    def _wait(self) -> None:
        """Until a line comes; at the end of the input the process ends, without what would follow the training."""
        if not sys.stdin.readline():
            os._exit(0)
        self.meter.zero()


def train_ours(side: Side, rows: list[Any], turns: Turns, folder: str) -> None:
    """`lora_sft.finetune`, with settings that any user could give."""
    from lora_sft import finetune

    finetune(
        side.model,
        [{"input_ids": ids, "labels": labels} for ids, labels in rows],
        output_dir=folder,
        listeners=[turns],
        layout="tokens",
        load_in_4bit=True,
        bf16=side.dtype == "bf16",
        device=side.device,
        lora_r=side.rank,
        lora_alpha=2 * side.rank,
        per_device_train_batch_size=side.micro_batch,
        gradient_accumulation_steps=1,
        max_steps=side.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        train_sampling_strategy=side.order,
        packing=side.packing,
        max_length=side.max_length,
        gradient_checkpointing=side.recompute,
        save_strategy="no",
        seed=side.seed,
        data_cache="off",
        max_lost_share=1.0,
    )


def train_trl(side: Side, rows: list[Any], turns: Turns, folder: str) -> None:
    """TRL's `SFTTrainer` on a model of transformers with an adapter of PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    if side.library == "liger":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as Loader
    else:
        Loader = AutoModelForCausalLM  # noqa: N806 - a class
    dtype = torch.bfloat16 if side.dtype == "bf16" else torch.float32
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    where = {"": 0 if side.device == "cuda" else "cpu"}
    model = Loader.from_pretrained(side.model, quantization_config=quantized, dtype=dtype, device_map=where)
    for module in model.modules():
        # bitsandbytes 0.50 repacks such weights at the first evaluation, after which they do not train any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, side.adapter, is_trainable=True)
    _train_with_trl(side, model, AutoTokenizer.from_pretrained(side.model), rows, turns, folder)


def train_unsloth(side: Side, rows: list[Any], turns: Turns, folder: str) -> None:
    """Unsloth's model in TRL's trainer, as its own notebooks have it."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from unsloth import FastLanguageModel

    dtype = torch.bfloat16 if side.dtype == "bf16" else torch.float32
    model, tokenizer = FastLanguageModel.from_pretrained(
        side.model, max_seq_length=side.max_length, dtype=dtype, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=side.rank,
        lora_alpha=2 * side.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if side.recompute else False,
        random_state=side.seed,
    )
    set_peft_model_state_dict(model, load_file(Path(side.adapter) / "adapter_model.safetensors"))
    _train_with_trl(side, model, tokenizer, rows, turns, folder)


def _train_with_trl(side: Side, model: Any, tokenizer: Any, rows: list[Any], turns: Turns, folder: str) -> None:
    """TRL's trainer under our clock; its collator counts the tokens of each micro-batch."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    counts: list[tuple[int, int]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.started(state.max_steps, 0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.stepped(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                turns.finished(logs["loss"], *counts[state.global_step - 1])

    arguments = SFTConfig(
        folder,
        per_device_train_batch_size=side.micro_batch,
        gradient_accumulation_steps=1,
        max_steps=side.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        bf16=side.dtype == "bf16",
        use_cpu=side.device == "cpu",
        dataloader_pin_memory=side.device == "cuda",
        gradient_checkpointing=side.recompute,
        train_sampling_strategy=side.order,
        packing=side.packing,
        padding_free=side.padding_free,
        max_length=side.max_length if side.packing else None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=side.seed,
    )
    data = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]})
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    if side.keeps_float32:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    collate = trainer.data_collator

    def counting(examples: list[dict[str, Any]]) -> Any:
        supervised = [label >= 0 for example in examples for label in example["labels"]]
        counts.append((sum(supervised), len(supervised)))
        return collate(examples)

    trainer.data_collator = counting
    trainer.train()


LIBRARIES: dict[str, Callable[[Side, list[Any], Turns, str], None]] = {
    "ours": train_ours,
    "trl": train_trl,
    "liger": train_trl,
    "unsloth": train_unsloth,
}


def main(file: str, folder: str) -> None:
    """Trains the side that a file describes; what the training writes goes to the folder."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = Side(**json.loads(Path(file).read_text()))
    if side.library == "unsloth":
        import unsloth  # noqa: F401 - before all others: it replaces parts of them
    import torch

    torch.set_num_threads(1)
    rows = json.loads(Path(side.rows).read_text())
    LIBRARIES[side.library](side, rows, Turns(side.device, said), folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
