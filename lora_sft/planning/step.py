"""A model's outline and micro-batches → two optimizer steps of the training, run on tensors without storage."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from lora_sft.kernels.standing import StandIn, standing_for
from lora_sft.planning.simulation import Simulation
from lora_sft.planning.ways import Ways
from lora_sft.training.loss import base_of, forward_loss
from lora_sft.training.watch import Growth

STEPS = 2
"""With the second, the optimizer's moments are there from the beginning."""


def simulate(
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    optimizer_of: Any,
    device: StandIn,
    autocast: torch.dtype | None,
    label_smoothing: float = 0.0,
    max_grad_norm: float = 1.0,
    watch_growth: bool = True,
) -> Simulation:
    """Two optimizer steps, each of all the micro-batches.

    Args:
        model: with its adapter and its swapped forwards, without storage.
        batches: of the collator, on the CPU.
        optimizer_of: trained parameters → their optimizer.
    """
    found, ways = Simulation(device), Ways(device)
    with ExitStack() as within:
        within.enter_context(standing_for(device))
        within.enter_context(ways)
        within.enter_context(found)
        within.enter_context(_phases(model, found))
        found.hold(_tensors_of(model), "model")
        trained = [one for one in model.parameters() if one.requires_grad]
        optimizer = optimizer_of(trained)
        growth = Growth(model) if watch_growth else None
        model.train()
        for _ in range(STEPS):
            for batch in batches:
                found.phase = "batch"
                moved = {
                    name: value.to("meta") if isinstance(value, Tensor) else value for name, value in batch.items()
                }
                found.phase = "forward"
                with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                    loss, output = forward_loss(model, moved, moved["labels"].numel(), label_smoothing)
                value = loss.value
                del moved, loss, output
                ways.forget_casts()
                found.phase = "backward"
                # What Tensor.backward calls in the end; it switches off whatever looks on above autograd meanwhile.
                _engine_run_backward((value,), (torch.ones_like(value),), False, False, (), True, True)
                del value
            found.phase = "optimizer"
            if max_grad_norm:
                torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
            optimizer.step()
            if growth is not None:
                growth.of_next()
            for one in trained:
                one.grad = None
    return found


@contextmanager
def _phases(model: Any, found: Simulation) -> Iterator[None]:
    head = base_of(model).get_output_embeddings()
    handles = [] if head is None else [head.register_forward_pre_hook(lambda *_: setattr(found, "phase", "loss"))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    for one in (*model.parameters(), *model.buffers()):
        yield one.data
        state = getattr(one, "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor))
            state = state.state2
        if isinstance(scales := getattr(one, "SCB", None), Tensor):
            yield scales
