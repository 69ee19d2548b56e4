"""A model and a micro-batch → how many bytes a forward pass keeps for its backward pass, layer by layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_sft.kernels.swap import Swaps
from lora_sft.training.loss import base_of


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


def input_apart(
    before: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A call of a layer → its input, and the call as a function of that; what all layers share stays in the latter."""
    rest = dict(kwargs)
    if args:
        others = args[1:]
        return args[0], lambda hidden: before(hidden, *others, **rest)
    hidden = rest.pop("hidden_states")
    return hidden, lambda hidden: before(hidden_states=hidden, **rest)


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
        hidden, run = input_apart(before, args, kwargs)
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
