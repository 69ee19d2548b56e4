"""A blueprint whose weights are here → how long ten real steps take, over what was foretold."""

import time
from statistics import median

import torch
from torch import Tensor

from lora_sft.errors import SettingError
from lora_sft.kernels.swap import Swaps
from lora_sft.model.adapter import build_model, lora_config
from lora_sft.model.base import load_base, read_config
from lora_sft.planning.devices import Device
from lora_sft.planning.plan import asked_recompute, batching_of
from lora_sft.planning.subject import Blueprint
from lora_sft.planning.trial import Recompute, lays_end_to_end, try_step
from lora_sft.planning.workload import Workload
from lora_sft.training.activations import layers_of
from lora_sft.training.fast import PARTS
from lora_sft.training.loss import forward_loss
from lora_sft.training.recompute import switch_on

STEPS = 10


def calibrate(plan: Blueprint, work: Workload, device: Device) -> float:
    """Takes ten steps with the largest micro-batch, of which nothing stays → their median over the plan's seconds.

    Raises:
        SettingError: the device is not here.
        ModelError: the weights are not here, or cannot be read.
    """
    if not device.is_here:
        raise SettingError("calibrate: real steps can be taken on this machine only; leave out gpu and vram")
    read_config(plan.spec)
    batch = work.largest(batching_of(plan, lays_end_to_end(plan, device)))
    how = asked_recompute(plan, device) or Recompute()
    foretold = try_step(plan, device, batch, how).pace
    base = load_base(plan.spec)
    lora = lora_config(plan.config, plan.new_token_ids, base)
    lora.init_lora_weights = True
    model = build_model(base, lora, plan.config.seed, plan.tokens).train()
    moved = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)
    dtype = getattr(torch, plan.spec.dtype)
    seconds = []
    with Swaps() as swaps:
        for swap in PARTS if plan.config.fast_kernels else ():
            swap(model, swaps)
        switch_on(layers_of(model)[: how.layers], swaps)
        for _ in range(STEPS):
            start = time.perf_counter()
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                loss, _ = forward_loss(model, moved)
            loss.value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return median(seconds) / (foretold.micro_batch + foretold.update)
