"""A model without storage and a micro-batch → an optimizer step of the training, followed allocation by allocation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from lora_sft.kernels.standing import standing_for
from lora_sft.kernels.swap import Swaps
from lora_sft.planning.devices import Device
from lora_sft.planning.optimizer import Optimizer
from lora_sft.planning.simulation import Simulation
from lora_sft.planning.ways import Ways, autocast_without_storage
from lora_sft.training.activations import layers_of
from lora_sft.training.loss import base_of, forward_loss
from lora_sft.training.offload import Away, HostCopies
from lora_sft.training.recompute import switch_on
from lora_sft.training.watch import Growth

Batch = Mapping[str, Any]

OF_A_LAYER = 8
"""Adapted matrices that are looked at for their growth: a run looks at one a step, and one of them is the largest."""


class _NowhereCopies(HostCopies):
    """What leaves the device takes nothing of it, and comes back as on any other."""

    def _send(self, tensor: Tensor, previous: Any) -> Any:
        copy = torch.zeros((), dtype=tensor.dtype, device="meta").expand(tensor.shape)
        return Away(copy, tensor.device, previous)


def simulate(
    model: Any,
    batch: Batch,
    optimizer: Optimizer,
    device: Device,
    dtype: torch.dtype,
    recomputed: int = 0,
    offload: bool = False,
    accumulates: bool = True,
    label_smoothing: float = 0.0,
    evaluation: Batch | None = None,
) -> Simulation:
    """One micro-batch of a run that is under way, and the update behind it; then a batch of the evaluation.

    Nothing differs from step to step once the optimizer's moments are there; they are made first.

    Args:
        model: with its adapter and its swapped forwards, on the `meta` device.
        batch: of the collator, on the CPU.
        dtype: of the arithmetic; 16-bit ones run under autocast.
        recomputed: of the first layers.
        offload: whether their inputs are kept on the host.
        accumulates: whether there are gradients of micro-batches before this one.
        evaluation: one of `evaluation.batches`.
    """
    found, ways = Simulation(device.stand_in), Ways(device.stand_in)
    in_16_bits = dtype in (torch.bfloat16, torch.float16)
    with ExitStack() as within:
        swaps = within.enter_context(Swaps())
        switch_on(layers_of(model)[:recomputed], swaps, _NowhereCopies() if offload else None)
        apart = _loss_is_told_apart(model, found)
        for mode in (standing_for(device.stand_in), autocast_without_storage(), ways, found, apart):
            within.enter_context(mode)
        autocast = torch.autocast("cpu", dtype if in_16_bits else torch.bfloat16, enabled=in_16_bits)
        _hold_model(model, found)
        trained = [one for one in model.parameters() if one.requires_grad]
        optimizer.begin(trained, found)
        growth = Growth(model)
        if accumulates:
            _hold_gradients(trained, found)
        model.train()
        _run(model, batch, found, ways, autocast, label_smoothing)
        found.hold((one.grad for one in trained if one.grad is not None), "gradients")
        found.phase = "optimizer"
        optimizer.step()
        for _ in range(OF_A_LAYER):
            growth.of_next()
        for one in trained:
            one.grad = None
        if evaluation is not None:
            found.phase = "evaluation"
            model.eval()
            with torch.no_grad(), autocast, _outputs_in_float32(model):
                forward_loss(model, _moved(evaluation))
    return found


def _run(model: Any, batch: Batch, found: Simulation, ways: Ways, autocast: Any, label_smoothing: float) -> None:
    """Forward and backward, with the lifetimes that they have in transformers' trainer."""
    found.phase = "batch"
    moved = _moved(batch)
    found.phase = "forward"
    with autocast, _outputs_in_float32(model):
        loss, output = forward_loss(model, moved, len(moved["places"]), label_smoothing)
    value = loss.value
    del moved, loss, output
    ways.forget_casts()
    found.phase = "backward"
    # What Tensor.backward calls in the end; it would switch off whatever looks on above autograd meanwhile.
    _engine_run_backward((value,), (torch.ones_like(value),), False, False, (), True, True)


def _moved(batch: Batch) -> dict[str, Any]:
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def _outputs_in_float32(model: Any) -> Iterator[None]:
    """Under autocast accelerate casts what a model gives back, such as logits, to float32."""
    with Swaps() as swaps:
        if torch.is_autocast_enabled("cpu"):
            swaps.forward(model, convert_outputs_to_fp32(model.forward))
        yield


@contextmanager
def _loss_is_told_apart(model: Any, found: Simulation) -> Iterator[None]:
    """From the output layer on, what a forward pass takes is for the loss."""

    def begins(*_: Any) -> None:
        if found.phase == "forward":
            found.phase = "loss"

    head = base_of(model).get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(begins)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _hold_model(model: nn.Module, found: Simulation) -> None:
    for one in (*model.parameters(), *model.buffers()):
        found.hold([one.data], "adapter" if one.requires_grad else "weights")
        state = getattr(one, "quant_state", None)
        while state is not None:
            held = (state.absmax, state.code, state.offset)
            found.hold((part for part in held if isinstance(part, Tensor)), "quantization state")
            state = state.state2
        if isinstance(scales := getattr(one, "SCB", None), Tensor):
            found.hold([scales], "quantization state")


def _hold_gradients(trained: Sequence[Tensor], found: Simulation) -> None:
    for one in trained:
        one.grad = torch.empty_like(one)
    found.hold((one.grad for one in trained if one.grad is not None), "gradients")
