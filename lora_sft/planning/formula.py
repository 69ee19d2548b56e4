"""A blueprint that cannot be simulated → its memory and time by a formula, marked as uncertain wherever it is shown."""

from collections.abc import Mapping
from typing import Any

import torch

from lora_sft.kernels.head import TILE_BYTES
from lora_sft.model.base import skeleton
from lora_sft.planning.account import Peak
from lora_sft.planning.devices import CONTEXT_BYTES, Device
from lora_sft.planning.pace import SHARES, Pace
from lora_sft.planning.subject import Blueprint
from lora_sft.planning.trial import Recompute, Trial
from lora_sft.planning.workload import computed_tokens

KEPT_WIDTHS = 14
"""Tensors as wide as the hidden states that a layer keeps of each token, with a gated MLP of 3.5 times the width."""


def estimate(plan: Blueprint, device: Device, batch: Mapping[str, Any], how: Recompute) -> Trial:
    """Weights by their count; activations as those of a Llama of the same width; the loss as one tile of logits."""
    text, dtype = plan.shape.get_text_config(), getattr(torch, plan.spec.dtype)
    weights = dict(skeleton(plan.shape, plan.spec).named_parameters())
    linear = sum(one.numel() for name, one in weights.items() if one.ndim == 2 and "embed" not in name)
    count = sum(one.numel() for one in weights.values())
    bits = {"nf4": 4.13, "fp4": 4.13, "int8": 8.0}.get(plan.spec.quantization or "", 8.0 * dtype.itemsize)
    held = int(linear * bits / 8 + (count - linear) * dtype.itemsize)
    sides = sum(sum(one.shape) for name, one in weights.items() if one.ndim == 2 and "layers" in name)
    adapter = 4 * plan.config.lora_r * sides
    tokens, width = computed_tokens(batch), text.hidden_size
    layer = KEPT_WIDTHS * tokens * width * dtype.itemsize
    inputs = tokens * width * dtype.itemsize
    recomputed = min(how.layers, plan.layers)
    activations = (plan.layers - recomputed) * layer + recomputed * (0 if how.offload else inputs) + layer
    tile = min(TILE_BYTES[device.kind], tokens * text.vocab_size * dtype.itemsize)
    parts = {
        "weights": held,
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": 2 * adapter,
        "activations": activations,
        "loss": tile * (1 + 8 // dtype.itemsize) + 2 * inputs,
        "workspaces": device.workspace_bytes,
    }
    allocated = sum(parts.values())
    needed = int(allocated * 1.05) + (CONTEXT_BYTES if device.kind == "cuda" else 0)
    peak = Peak(allocated, int(allocated * 1.05), needed, parts, "unknown")
    flops = 2 * count * tokens * (2 + recomputed / max(plan.layers, 1))
    seconds = flops / (SHARES[device.kind][0] * device.flops.get(dtype, min(device.flops.values())))
    return Trial(peak, Pace(seconds, 8 * adapter / device.bandwidth), tokens, inputs * recomputed if how.offload else 0)
