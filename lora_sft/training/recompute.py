"""A model and its largest micro-batch → how much of a forward pass is kept for the backward one, and where.

The ladder, from fast to small: keep everything; recompute the first layers, as few as it takes (selective); recompute
all (full); and keep the inputs of the layers, which is all that is left then, in the memory of the host (offload).
Selective goes by whole layers: the first ones are recomputed when everything behind them is freed already, so that it
adds nothing to the peak. To keep the matrix products of every layer and recompute the rest holds as much for as many
seconds with NF4, depends on the names of kernels, and fails where one adds to a product in place.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_sft.console import say
from lora_sft.errors import ModelError
from lora_sft.kernels.swap import Swaps
from lora_sft.training.activations import Activations, input_apart, layers_of, measure
from lora_sft.training.batching import Batching, BatchPlan, Lengths, computed_tokens, plan_batches
from lora_sft.training.offload import HostCopies
from lora_sft.training.shortage import let_go

Mode = Literal["none", "selective", "full", "offload"]

SHARE_TO_USE = {"cuda": 0.9, "cpu": 0.5}
"""Of the free memory. A GPU's allocator cannot use all that is free; a computer has other things to do."""

BYTES_OF_A_TRAINED_WEIGHT = 12
"""A gradient and two AdamW moments in float32, which come with the first step."""


Measured = tuple[Activations | None, int]
"""What the largest micro-batch keeps, None if it is out of memory already in its forward pass; and free bytes."""


class Rung(NamedTuple):
    """One step of the ladder.

    Attributes:
        mode: which it is.
        recomputed: of the first layers.
        needed: bytes for activations at the peak of a micro-batch.
    """

    mode: Mode
    recomputed: int
    needed: int


def ladder(found: Activations, can_offload: bool) -> list[Rung]:
    """The rungs from fast to small. One that needs no less than one before is left out, such as full recomputation
    where the last layer decides: it is whole in memory when the backward pass begins, kept or computed again."""
    layers = len(found.kept)
    rungs = [Rung("none", 0, found.peak(0))]
    rungs += [Rung("selective", n, found.peak(n)) for n in range(1, layers)]
    if layers:
        rungs.append(Rung("full", layers, found.peak(layers)))
    if layers and can_offload:
        here = found.outside + 3 * max(found.inputs)  # one leaves, one is used, one arrives
        rungs.append(Rung("offload", layers, found.peak(layers, here)))
    lowest = [*accumulate((rung.needed for rung in rungs), min)]
    return [rung for n, rung in enumerate(rungs) if n == 0 or rung.needed < lowest[n - 1]]


def choose_rung(rungs: Sequence[Rung], free: int, layers: int) -> tuple[Rung, str]:
    """The first rung that fits into so many bytes, and the reason in words; if none does, the smallest.

    Args:
        rungs: from `ladder`.
        layers: that there are.
    """
    fitting = next((rung for rung in rungs if rung.needed <= free), rungs[-1])
    needs = f"needs {gib(fitting.needed)} for activations, {gib(free)} are free"
    if fitting.needed > free:
        needs += "; should memory run out, halve per_device_train_batch_size and double gradient_accumulation_steps"
    elif fitting is not rungs[0]:
        needs += f"; without recomputation it would be {gib(rungs[0].needed)}"
    return fitting, f"{in_words(fitting.mode, fitting.recomputed, layers)} ({needs})"


def in_words(mode: Mode, recomputed: int, layers: int) -> str:
    """What is done, without the reason."""
    return {
        "none": "no recomputation",
        "selective": f"the first {recomputed} of {layers} layers are recomputed",
        "full": "all layers are recomputed",
        "offload": "all layers are recomputed, their inputs are kept in the memory of the host",
    }[mode]


def gib(count: int) -> str:
    """`3.1 GiB`, or below one of them `120 MiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def free_bytes(device: torch.device) -> int:
    """What may be used of the memory that is free now: of the GPU, or of the computer."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available * SHARE_TO_USE["cpu"])
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free + unused) * SHARE_TO_USE["cuda"])


def recompute(
    model: Any,
    asked: bool | int | Literal["selective", "offload"] | None,
    run: Callable[[], Tensor],
    swaps: Swaps,
    over_ranks: Callable[[Measured], Sequence[Measured]] = lambda here: [here],
) -> Mode:
    """Switches on what is asked for, or what is needed, and says it.

    To be called when all other forwards are swapped: theirs are what is recomputed.

    Args:
        model: with its adapter.
        asked: the setting; None measures, and takes the first rung that fits.
        run: computes the loss of the largest micro-batch, in training mode.
        swaps: gets the layers.
        over_ranks: what was measured in this process, and its free bytes → those of all of them.

    Raises:
        ModelError: something is asked for, and the model has no layers that are known.
    """
    layers, device = layers_of(model), model.device
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):  # of a model that was given loaded: ours takes its place
            module.gradient_checkpointing = False
    if not layers:
        if asked:
            raise ModelError("gradient_checkpointing: this model's layers are not known; set it to false")
        say("memory", "no recomputation (this model's layers are not known)")
        return "none"
    if asked is None:
        found = over_ranks((_measure(model, run), free_bytes(device) - bytes_of_first_step(model)))
        mode, count, words = _choose(found, len(layers), device)
    else:
        mode = "offload" if asked == "offload" and device.type == "cuda" else _asked_mode(asked, len(layers))
        some = -(-len(layers) // 2) if asked == "selective" else int(asked) if mode == "selective" else 0
        count = {"none": 0, "selective": some}.get(mode, len(layers))
        words = f"{in_words(mode, count, len(layers))} (asked for)"
        if asked == "offload" and mode == "full":
            words = f"{in_words(mode, count, len(layers))} (offload has nothing to do on the CPU)"
    say("memory", words)
    switch_on(layers[:count], swaps, HostCopies() if mode == "offload" else None)
    return mode


def _measure(model: Any, run: Callable[[], Tensor]) -> Activations | None:
    try:
        return measure(model, run)
    except torch.OutOfMemoryError:
        pass
    let_go(model.device)
    return None


def _choose(found: Sequence[Measured], layers: int, device: torch.device) -> tuple[Mode, int, str]:
    """What was measured in all processes → what is done, in how many of the layers, and why."""
    measured = [activations for activations, _ in found if activations is not None]
    if len(measured) < len(found):
        why = "the forward pass of the largest micro-batch is out of memory already"
        return "full", layers, f"{in_words('full', layers, layers)} ({why})"
    free = max(0, min(free for _, free in found))
    ladders = [ladder(activations, device.type == "cuda") for activations in measured]
    chosen = max(ladders, key=lambda rungs: rungs[0].needed)
    rung, words = choose_rung(chosen, free, len(measured[0].kept))
    return rung.mode, rung.recomputed, words


def _asked_mode(asked: bool | int | str, layers: int) -> Mode:
    if not asked or isinstance(asked, str):
        return "selective" if asked == "selective" else "full" if asked else "none"
    return "selective" if asked is not True and asked < layers else "full"


def bytes_of_first_step(model: nn.Module) -> int:
    """What comes with the first step and stays: gradients and moments."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return BYTES_OF_A_TRAINED_WEIGHT * trained


def largest_batch(lengths: Lengths, batching: Batching) -> list[int]:
    """The examples of that micro-batch of the first epoch in which most tokens are computed, padding included."""
    return largest_of(plan_batches(lengths, batching), lengths)


def largest_of(plan: BatchPlan, lengths: Lengths) -> list[int]:
    """The same of another epoch."""

    def computed(batch: Sequence[int]) -> int:
        return computed_tokens([int(lengths[index]) for index in batch], plan.batching)

    return max(plan.batches, key=computed)


def recompute_all(model: nn.Module, swaps: Swaps) -> bool:
    """From now on all layers are recomputed, as `switch_on` does it. False: they were already, or are not known."""
    left = [layer for layer in layers_of(model) if not isinstance(layer.forward, _Recomputed)]
    switch_on(left, swaps)
    return bool(left)


def setting_of(model: nn.Module) -> bool | int | str:
    """What is recomputed now, as `gradient_checkpointing` says it."""
    layers = layers_of(model)
    found = [layer.forward for layer in layers if isinstance(layer.forward, _Recomputed)]
    if any(forward.away is not nullcontext for forward in found):
        return "offload"
    return {0: False, len(layers): bool(layers)}.get(len(found), len(found))


def switch_on(layers: Sequence[nn.Module], swaps: Swaps, host: "HostCopies | None" = None) -> None:
    """From now on these layers are recomputed in the backward pass, with the same dropout.

    Nobody has to make the embeddings' output require a gradient: torch's non-reentrant checkpoint goes by what is
    saved inside, so nothing is computed below the first adapter.

    Args:
        host: keeps the layers' inputs; None leaves them where they are.
    """
    for number, layer in enumerate(layers):
        # The last one's input is needed again at once.
        away = host.keeping(number) if host is not None and number < len(layers) - 1 else nullcontext
        swaps.forward(layer, _Recomputed(layer, layer.forward, away))


@dataclass(eq=False)
class _Recomputed:
    """A layer's forward, of which the backward pass keeps the input alone."""

    layer: nn.Module
    before: Callable[..., Any]
    away: Callable[[], AbstractContextManager[Any]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.before(*args, **kwargs)
        hidden, run = input_apart(self.before, args, kwargs)
        with self.away():
            return checkpoint(run, hidden, use_reentrant=False)
