"""A model and its largest micro-batch → how much of a forward pass is kept for the backward one, and where.

The ladder, from fast to small: keep everything; recompute the first layers, as few as it takes (selective); recompute
all (full); and keep the inputs of the layers, which is all that is left then, in the memory of the host (offload).
Selective goes by whole layers: the first ones are recomputed when everything behind them is freed already, so that it
adds nothing to the peak. To keep the matrix products of every layer and recompute the rest holds as much for as many
seconds with NF4, depends on the names of kernels, and fails where one adds to a product in place.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_sft.console import say
from lora_sft.errors import ModelError
from lora_sft.kernels.swap import Swaps
from lora_sft.training.batching import Batching, Lengths, plan_batches
from lora_sft.training.loss import base_of

Mode = Literal["none", "selective", "full", "offload"]

SHARE_TO_USE = {"cuda": 0.9, "cpu": 0.5}
"""Of the free memory. A GPU's allocator cannot use all that is free; a computer has other things to do."""

BYTES_OF_A_TRAINED_WEIGHT = 12
"""A gradient and two AdamW moments in float32, which come with the first step."""


@dataclass(frozen=True)
class Activations:
    """What one forward pass keeps for its backward pass, in bytes.

    Attributes:
        kept: by each layer in the order of the arithmetic, if it is not recomputed.
        inputs: of each layer; with recomputation, that is what it keeps.
        outside: by all that is no layer: embeddings, masks, output layer and loss.
    """

    kept: Sequence[int]
    inputs: Sequence[int]
    outside: int

    def held(self, recomputed: int) -> int:
        """What is held at the end of the forward pass if so many of the first layers are recomputed."""
        return self.outside + sum(self.inputs[:recomputed]) + sum(self.kept[recomputed:])

    def peak(self, recomputed: int, held: int | None = None) -> int:
        """The most that is needed during the backward pass, in which gradients are as large as what they are of.

        It is reached at its beginning, in the loss or in the last layer, which is computed again first if it is among
        those that are recomputed.

        Args:
            held: at the end of the forward pass, where it is not `held(recomputed)`.
        """
        held = self.held(recomputed) if held is None else held
        layer = max(self.kept, default=0) * (2 if recomputed == len(self.kept) else 1)
        return max(held + self.outside, held - self.outside + layer)


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
    asked: bool | Literal["selective", "offload"] | None,
    run: Callable[[], Tensor],
    swaps: Swaps,
    over_ranks: Callable[[tuple[Activations, int]], Sequence[tuple[Activations, int]]] = lambda here: [here],
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
        found = over_ranks((measure(model, run), free_bytes(device) - _still_to_come(model)))
        free = max(0, min(free for _, free in found))
        ladders = [ladder(activations, device.type == "cuda") for activations, _ in found]
        chosen = max(ladders, key=lambda rungs: rungs[0].needed)
        rung, words = choose_rung(chosen, free, len(found[0][0].kept))
        mode, count = rung.mode, rung.recomputed
    else:
        mode = "offload" if asked == "offload" and device.type == "cuda" else _asked_mode(asked)
        count = {"none": 0, "selective": -(-len(layers) // 2)}.get(mode, len(layers))
        words = f"{in_words(mode, count, len(layers))} (asked for)"
        if asked == "offload" and mode == "full":
            words = f"{in_words(mode, count, len(layers))} (offload has nothing to do on the CPU)"
    say("memory", words)
    switch_on(layers[:count], swaps, HostCopies() if mode == "offload" else None)
    return mode


def _asked_mode(asked: bool | str) -> Mode:
    return "none" if not asked else "selective" if asked == "selective" else "full"


def _still_to_come(model: nn.Module) -> int:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return BYTES_OF_A_TRAINED_WEIGHT * trained


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model of transformers, in order: what it can checkpoint itself, or must not be split.

    Of one that also sees or hears, those of its language model.
    """
    base = base_of(model)
    text = (base.get_decoder() if hasattr(base, "get_decoder") else None) or base
    whole = tuple(getattr(base, "_no_split_modules", None) or ())
    found = _outermost(text, lambda module: isinstance(module, GradientCheckpointingLayer))
    return found or _outermost(text, lambda module: type(module).__name__ in whole)


def _outermost(module: nn.Module, is_one: Callable[[nn.Module], bool]) -> list[nn.Module]:
    return [found for child in module.children() for found in ([child] if is_one(child) else _outermost(child, is_one))]


def largest_batch(lengths: Lengths, batching: Batching) -> list[int]:
    """The examples of that micro-batch of the first epoch in which most tokens are computed, padding included."""

    def computed(batch: Sequence[int]) -> int:
        sizes = [int(lengths[index]) for index in batch]
        end_to_end = batching.packing or batching.one_row
        return sum(sizes) if end_to_end else len(sizes) * max(sizes, default=0)

    return max(plan_batches(lengths, batching).batches, key=computed)


# --- switching it on ----------------------------------------------------------------------------------


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
        swaps.forward(layer, _recomputed(layer, layer.forward, away))


def _recomputed(
    layer: nn.Module, before: Callable[..., Any], away: Callable[[], AbstractContextManager[Any]]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return before(*args, **kwargs)
        hidden, run = _apart(before, args, kwargs)
        with away():
            return checkpoint(run, hidden, use_reentrant=False)

    return forward


def _apart(
    before: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A call of a layer → its input, and the call as a function of that; what all layers share stays in the latter."""
    rest = dict(kwargs)
    if args:
        others = args[1:]
        return args[0], lambda hidden: before(hidden, *others, **rest)
    hidden = rest.pop("hidden_states")
    return hidden, lambda hidden: before(hidden_states=hidden, **rest)


@dataclass
class _Away:
    """A layer's input that was sent to the host.

    Attributes:
        copy: of it, on the host.
        device: from which it came.
        previous: of the layer before, which the backward pass needs next.
        arriving: on its way back to the device, and the event of its arrival.
    """

    copy: Tensor
    device: torch.device
    previous: "_Away | None"
    arriving: tuple[Tensor, Any] | None = None


@dataclass
class HostCopies:
    """Inputs of layers, copied to the host while the layer computes, and back one layer ahead of the backward pass.

    Copies go through pinned memory on a stream of their own. A tensor on the CPU is copied at once, which is of no use
    but to try it.
    """

    _latest: _Away | None = None
    _streams: dict[torch.device, Any] = field(default_factory=dict)

    def keeping(self, number: int) -> Callable[[], AbstractContextManager[Any]]:
        """What is saved within the context is kept on the host; layer 0 begins a forward pass."""

        def pack(tensor: Tensor) -> _Away:
            away = self._send(tensor, None if number == 0 else self._latest)
            self._latest = away
            return away

        return lambda: saved_tensors_hooks(pack, self._fetch)

    def _send(self, tensor: Tensor, previous: _Away | None) -> _Away:
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
        if tensor.is_cuda:
            stream = self._stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                copy.copy_(tensor.detach(), non_blocking=True)
            tensor.record_stream(stream)  # its memory is not given to others before the copy is made
        else:
            copy.copy_(tensor.detach())
        return _Away(copy, tensor.device, previous)

    def _fetch(self, away: _Away) -> Tensor:
        self._latest = None
        tensor, arrived = self._bring(away)
        away.arriving = None
        if arrived is not None:
            now = torch.cuda.current_stream(away.device)
            now.wait_event(arrived)
            tensor.record_stream(now)
        if away.previous is not None:
            self._bring(away.previous)
        return tensor

    def _bring(self, away: _Away) -> tuple[Tensor, Any]:
        """Starts the way back, unless it has begun."""
        if away.arriving is None:
            if away.device.type == "cuda":
                stream = self._stream(away.device)
                with torch.cuda.stream(stream):
                    away.arriving = away.copy.to(away.device, non_blocking=True), stream.record_event()
            else:
                away.arriving = away.copy.clone(), None
        return away.arriving

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


# --- measuring ----------------------------------------------------------------------------------------


def measure(model: Any, run: Callable[[], Tensor]) -> Activations:
    """Runs a micro-batch forward and counts what it saves for a backward pass, of which nothing is held.

    Of layers that are alike, one is computed and counted for all; where a layer returns more than a tensor, each is.
    Storage that several tensors share counts once, parameters and buffers do not count. What a function keeps as an
    attribute of its context, instead of saving it, is not seen. The random generators are left as they were.

    Args:
        run: computes the loss.
    """
    count = _Count(tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    kept: list[int] = []
    inputs: list[int] = []
    alike: dict[Any, int] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with Swaps() as swaps, torch.random.fork_rng(devices=devices):
        for layer in layers_of(model):
            swaps.forward(layer, _counted(layer, layer.forward, count, kept, inputs, alike))
        with count, torch.enable_grad():
            run()
    return Activations(kept, inputs, count.total - sum(count.inside))


def _counted(
    layer: nn.Module,
    before: Callable[..., Any],
    count: "_Count",
    kept: list[int],
    inputs: list[int],
    alike: dict[Any, int],
) -> Callable[..., Any]:
    """A forward that counts what it saves, or, where that is known of a layer like it, gives back its input."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, run = _apart(before, args, kwargs)
        inputs.append(hidden.untyped_storage().nbytes())
        kind = (_kind_of(layer), hidden.requires_grad)
        if kind in alike:
            kept.append(alike[kind])
            return hidden
        count.see(value for value in (*args[1:], *kwargs.values()) if value is not hidden)  # all layers share it
        before_it = count.total
        output = run(hidden)
        kept.append(count.total - before_it)
        count.inside.append(kept[-1])
        if isinstance(output, Tensor) and output.shape == hidden.shape and output.requires_grad == hidden.requires_grad:
            alike[kind] = kept[-1]
        return output

    return forward


def _kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """What is equal in layers that save equally much."""
    parameters = tuple((name, one.shape, one.requires_grad) for name, one in layer.named_parameters())
    return type(layer), parameters


class _Count(AbstractContextManager["_Count"]):
    """Within the context: bytes of what autograd saves, none of which it holds.

    Attributes:
        total: bytes so far.
        inside: of those, what each counted layer saved.
    """

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        self.total = 0
        self.inside: list[int] = []
        # A weak reference keeps the address of a storage from being used for another one.
        self._seen: dict[Any, StorageWeakRef] = {}
        for tensor in excluded:
            self._is_new(tensor)
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> "_Count":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def see(self, values: Iterable[Any]) -> None:
        """Counts tensors, also those inside tuples, lists and mappings."""
        for value in values:
            if isinstance(value, Tensor):
                self._pack(value)
            elif isinstance(value, (tuple, list)):
                self.see(value)
            elif isinstance(value, Mapping):
                self.see(value.values())

    def _pack(self, tensor: Tensor) -> None:
        if self._is_new(tensor):
            self.total += tensor.untyped_storage().nbytes()

    def _is_new(self, tensor: Tensor) -> bool:
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        if storage.cdata in self._seen:
            return False
        self._seen[storage.cdata] = storage
        return True

    def _unpack(self, nothing: None) -> Tensor:
        raise RuntimeError("a forward pass that only counts what it saves has no backward pass")
