"""A case → the memory of its training by the allocator's own record, and by the plan."""

import gc
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from lora_sft.chat.labels import Example
from lora_sft.config import RunConfig
from lora_sft.kernels.swap import Swaps
from lora_sft.model.adapter import build_model, lora_config
from lora_sft.model.base import BaseSpec, load_base, with_precision
from lora_sft.model.tiny import tiny_tokenizer
from lora_sft.planning.devices import Device
from lora_sft.planning.optimizer import Optimizer
from lora_sft.planning.plan import asked_recompute, batching_of, make_plan
from lora_sft.planning.simulation import Simulation
from lora_sft.planning.step import simulate
from lora_sft.planning.subject import Blueprint, subject_of
from lora_sft.planning.trial import Recompute, lays_end_to_end
from lora_sft.planning.workload import Workload
from lora_sft.training.fast import PARTS
from lora_sft.training.trainer import build_trainer, choose_batching, training_arguments

HERE = Device("the CPU", "cpu", 2**40, {torch.float32: 1e11, torch.bfloat16: 2e11}, 1e10)

WIDE = {
    "vocab_size": 32000,
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 6,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 64, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 64,
        "num_key_value_heads": 2,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "mistral": {"sliding_window": None},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 3,
        "head_dim": 64,
    },
    "gpt2": {"n_embd": 640, "n_layer": 6, "n_head": 10},
}


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        family: of `FAMILIES`, in the shape `WIDE` with the fields `shape`.
        quantization: of the base.
        dtype: of the arithmetic.
        settings: of the run.
        lengths: of the examples, of which the second half is learned.
    """

    family: str = "llama"
    quantization: str | None = None
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (160, 70, 130, 110)
    shape: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        own = {"per_device_train_batch_size": len(self.lengths), "gradient_accumulation_steps": 1, "lora_r": 8}
        base = {"load_in_4bit": self.quantization == "nf4", "load_in_8bit": self.quantization == "int8"}
        # In the order of the data all steps have the same rows: the second has the optimizer's moments too.
        base |= {"max_steps": 2, "save_strategy": "no", "train_sampling_strategy": "sequential"}
        return RunConfig(**own | base | self.settings)

    @property
    def spec(self) -> BaseSpec:
        return with_precision(BaseSpec(""), self.config, self.dtype, "cpu")

    def examples(self) -> list[Example]:
        random = np.random.default_rng(0)
        ids = [random.integers(3, 30000, size).tolist() for size in self.lengths]
        rows = [Example(row, [-100] * (len(row) // 2) + row[len(row) // 2 :]) for row in ids]
        return rows * 2 * self.config.gradient_accumulation_steps

    def work(self) -> Workload:
        rows = self.examples()
        return Workload(rows, [len(row.input_ids) for row in rows], None, "")

    def blueprint(self) -> Blueprint:
        return Blueprint(self.model_config(), self.spec, self.config)

    def model_config(self) -> Any:
        return AutoConfig.for_model(self.family, **WIDE | FAMILIES[self.family] | self.shape)


@dataclass(frozen=True)
class Bytes:
    """What a model holds, and what a step holds beside it at most."""

    model: int
    step: int


def foretold(case: Case) -> Bytes:
    """By the plan."""
    plan = make_plan(case.blueprint(), case.work(), HERE)
    assert not any("cannot be simulated" in note for note in plan.assumptions), plan.assumptions
    held = sum(plan.peak.parts.get(part, 0) for part in ("weights", "quantization state", "adapter"))
    return Bytes(held, plan.peak.allocated - held)


def measured(case: Case) -> Bytes:
    """By the record of the allocator, of two steps of the trainer itself."""
    held, found = watched(case)
    return Bytes(held, highest(found))


def watched(case: Case) -> tuple[int, Any]:
    """What the model holds, and what the profiler saw of two steps of the trainer itself."""
    with _model(case) as (model, swaps):
        rows, config = case.examples(), case.config
        arguments = training_arguments(config, "cpu", case.dtype, has_eval_data=False)
        batching = choose_batching(model, config, arguments)
        speech = SimpleNamespace(tokenizer=tiny_tokenizer(["what is it?"]))
        trainer = build_trainer(model, speech, rows, [], config, arguments, [], batching=batching, swaps=swaps)
        held = sum(_storages(model).values())
        gc.collect()  # what earlier cases left would be given back meanwhile
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            trainer.train()
    return held, found


def highest(found: Any) -> int:
    """The most bytes that were held at a time, of what was taken while the profiler looked on."""
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextmanager
def _model(case: Case) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        AutoModelForCausalLM.from_config(case.model_config(), dtype=dtype).save_pretrained(folder)
        base = load_base(replace(case.spec, name=folder))
    config = case.config
    model = build_model(base, lora_config(config, [], base), 0)
    with Swaps() as swaps:
        for swap in PARTS if config.fast_kernels else ():
            swap(model, swaps)
        yield model, swaps


def _storages(model: Any) -> dict[int, int]:
    found = {}
    for one in (*model.parameters(), *model.buffers()):
        tensors = [one, getattr(one, "SCB", None)]
        state = getattr(one, "quant_state", None)
        while state is not None:
            tensors += [state.absmax, state.code, state.offset]
            state = state.state2
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return found


def simulated(case: Case) -> Simulation:
    """A step of the plan, with every block."""
    plan = case.blueprint()
    batching = batching_of(plan, lays_end_to_end(plan, HERE))
    how = asked_recompute(plan, HERE) or Recompute()
    model, dtype = subject_of(plan, HERE).model, getattr(torch, case.dtype)
    return simulate(model, case.work().largest(batching), Optimizer(case.config), HERE, dtype, how.layers)
