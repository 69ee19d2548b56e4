"""A model's gated MLPs (SwiGLU, GeGLU) → the same, with act(gate) ∘ up in one function that holds gate and up only."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from lora_sft.kernels.blocks import blocks_of, rows_at_a_time
from lora_sft.kernels.proof import gap, likeness, noise
from lora_sft.kernels.standing import kind_of, with_numbers
from lora_sft.kernels.swap import Part, Swaps

LAYOUTS = (("gate_proj", "up_proj"), ("gate_up_proj",))
"""The projections in front of the product: two, or one whose outputs are the gate's and then the other's (Phi)."""

SCALES = (1.0, 30.0)
"""Of the inputs on which an MLP is proven; at the second one, limits that some put on their gates count."""

PROBE_WIDTH = 32


class Activation(NamedTuple):
    """An element-wise function and its gradient, each written into a tensor that is given.

    Attributes:
        name: what transformers and torch call it.
        plain: the function itself, for any dtype.
        write: (x, out=) → act(x).
        write_gradient: (gradient at act(x), x, grad_input=) → that at x.
    """

    name: str
    plain: Callable[[Tensor], Tensor]
    write: Callable[..., Any]
    write_gradient: Callable[..., Any]


def _gelu(name: str, approximate: str) -> Activation:
    """GELU as it is ("none"), or by tanh."""
    return Activation(
        name,
        lambda x: F.gelu(x, approximate=approximate),
        lambda x, out: _ATEN.gelu.out(x, approximate=approximate, out=out),
        lambda g, x, grad_input: _ATEN.gelu_backward.grad_input(g, x, approximate=approximate, grad_input=grad_input),
    )


_ATEN = torch.ops.aten

SILU = Activation("silu", F.silu, _ATEN.silu.out, _ATEN.silu_backward.grad_input)
GELU, GELU_TANH = _gelu("gelu", "none"), _gelu("gelu_tanh", "tanh")
ACTIVATIONS = (SILU, GELU, GELU_TANH)

Product = Callable[..., Tensor]
"""Of the activation and the parts: gate and up, or both in one. May take `shared`, as `gated_product` does."""


class Shared:
    """act(gate), from when `computed_again` made it for the layer behind a product until the product's gradient is had.

    Backward comes to the two one right after the other; it costs as much as the rest of the product's gradient.
    """

    activated: Tensor | None = None  # (rows, width)


def gated_product(activation: Activation, *parts: Tensor, shared: Shared | None = None) -> Tensor:
    """p = act(gate) ∘ up, of shape (…, width).

    With g the gradient at p, that at up is g ∘ act(gate) and that at gate is g ∘ up ∘ act'(gate). Only the parts are
    held for it; act(gate) is computed again, or taken from what is shared.

    Args:
        parts: gate and up (…, width) of one dtype, or one tensor (…, 2 · width) with the gate first.

    Source: GLU Variants Improve Transformer (arXiv 2002.05202).
    """
    return _GatedProduct.apply(activation, shared or Shared(), *parts)  # type: ignore[no-any-return, no-untyped-call]


class _GatedProduct(torch.autograd.Function):
    """`gated_product`."""

    @staticmethod
    def forward(ctx: Any, activation: Activation, shared: Shared, *parts: Tensor) -> Tensor:
        ctx.activation, ctx.shared = activation, shared
        ctx.save_for_backward(*parts)
        return _product(activation, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_product: Tensor) -> tuple[Tensor | None, ...]:
        activation, parts = ctx.activation, ctx.saved_tensors
        activated, ctx.shared.activated = ctx.shared.activated, None
        gradients = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in parts]
        rows = at_product.reshape(-1, at_product.shape[-1])
        buffer = torch.empty_like(rows[: rows_at_a_time(rows.shape[-1], rows.device)])
        gate, up = _halves(parts)
        given = gate if activated is None else activated
        for g, gate_rows, up_rows, given_rows, at_gate, at_up in blocks_of(rows, gate, up, given, *_halves(gradients)):
            if activated is None:
                given_rows = activation.write(gate_rows, out=at_up)
            torch.mul(given_rows, g, out=at_up)
            at_activation = torch.mul(g, up_rows, out=buffer[: len(g)])
            activation.write_gradient(at_activation, gate_rows, grad_input=at_gate)
        return None, None, *gradients


def _product(activation: Activation, *parts: Tensor, shared: Shared | None = None) -> Tensor:
    """act(gate) ∘ up, block by block; shared, act(gate) is kept."""
    gate, up = _halves(parts)
    found = torch.empty(*parts[0].shape[:-1], gate.shape[-1], dtype=gate.dtype, device=gate.device)
    rows = found.view(-1, gate.shape[-1])
    activated = rows if shared is None else torch.empty_like(rows)
    for p, a, gate_rows, up_rows in blocks_of(rows, activated, gate, up):
        activation.write(gate_rows, out=a)
        torch.mul(a, up_rows, out=p)
    if shared is not None:
        shared.activated = activated
    return found


def _halves(parts: Any) -> list[Tensor]:
    """Gate and up as rows (rows, width); views of the parts where these are contiguous."""
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    return rows if len(rows) == 2 else list(rows[0].chunk(2, -1))


class _Again(NamedTuple):
    """In the place of a product that was not held: its shape, to compute it again."""

    shape: torch.Size


def computed_again(
    product: Tensor, activation: Activation, shared: Shared | None, *parts: Tensor
) -> AbstractContextManager[Any]:
    """While it is entered, autograd holds the parts wherever it would hold their product, and multiplies them again.

    The parts are held anyway by `gated_product`; the product otherwise by the adapter behind it, whose weight's
    gradient needs it. Where other hooks decide already what is held (checkpointing, offloading), they go on to.
    """
    # No public way to ask which hooks are in force; torch's own compiler asks so too.
    others = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if not (product.requires_grad and torch.is_grad_enabled()) or others is not None:
        return nullcontext()
    storage, count, dtype = product.untyped_storage()._cdata, product.numel(), product.dtype
    held = [part.detach() for part in parts]

    def pack(tensor: Tensor) -> Tensor | _Again:
        same = tensor.untyped_storage()._cdata == storage and (tensor.numel(), tensor.dtype) == (count, dtype)
        return _Again(tensor.shape) if same and tensor.is_contiguous() else tensor

    def unpack(packed: Tensor | _Again) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return _product(activation, *held, shared=shared).view(packed.shape)

    return saved_tensors_hooks(pack, unpack)


def swap_gated(model: nn.Module, swaps: Swaps) -> Part:
    """Gives gated MLPs `gated_product`, or Liger's kernel on a GPU where that is installed, between their projections.

    An MLP is a module with `gate_proj`, `up_proj` and `down_proj`, or `gate_up_proj` and `down_proj`. Each sort is
    proven first: values and gradients on random inputs, in training, against its own forward with the projections
    taken out. What is not proven keeps its own and is named.
    """
    proven: dict[tuple[Any, ...], tuple[Product, Activation] | None] = {}
    engaged, left = 0, set()
    for module in model.modules():
        layout = _layout(module)
        if layout is None:
            continue
        if "forward" in vars(module):
            left.add(f"{type(module).__name__} stays as it is")
            continue
        sort = _sort(module, layout)
        if sort not in proven:
            proven[sort] = _prove(module, layout)
        if (found := proven[sort]) is None:
            left.add(f"{type(module).__name__} computes something else")
        else:
            swaps.forward(module, _forward_of(module, layout, *found))
            engaged += 1
    return Part("gated MLP", engaged, ", ".join(sorted(left)))


def _layout(module: nn.Module) -> tuple[str, ...] | None:
    """The projections in front of a module's product, if it looks like a gated MLP."""
    children = dict(module.named_children())
    if "down_proj" not in children:
        return None
    return next((layout for layout in LAYOUTS if children.keys() >= set(layout)), None)


class _Turned(nn.Module):
    """In the place of a projection while an MLP is proven: the inputs, turned by some places."""

    def __init__(self, *places: int) -> None:
        super().__init__()
        self.places = places

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, width) → (…, width for each of the places), without rounding."""
        return torch.cat([inputs.roll(one, -1) for one in self.places], -1)


def _probe(module: nn.Module, layout: tuple[str, ...]) -> nn.Module:
    """The same module in training, with nothing to learn in its projections: what is between them stays."""
    stand_ins = {"down_proj": _Turned(0)}
    stand_ins |= {"gate_proj": _Turned(0), "up_proj": _Turned(1)} if len(layout) == 2 else {layout[0]: _Turned(0, 1)}
    probe = copy.copy(module)
    probe.__dict__["_modules"] = {
        name: stand_ins.get(name) or copy.deepcopy(child) for name, child in module.named_children()
    }
    return probe.train()


def _sort(module: nn.Module, layout: tuple[str, ...]) -> tuple[Any, ...]:
    """Equal for MLPs that differ at most in their projections."""
    return likeness(_probe(module, layout)), _devices(module)


def _devices(module: nn.Module) -> tuple[torch.device, ...]:
    """Where a module's weights are."""
    return tuple(sorted({parameter.device for parameter in module.parameters()}, key=str))


def _products(device: torch.device, layout: tuple[str, ...]) -> list[tuple[Product, Activation]]:
    """What may compute a product there, the fastest first of each activation."""

    found: list[tuple[Product, Activation]] = [(gated_product, activation) for activation in ACTIVATIONS]
    if kind_of(device) != "cuda" or len(layout) != 2:
        return found
    try:
        from liger_kernel.ops import (  # type: ignore[import-not-found, unused-ignore]
            LigerGELUMulFunction,
            LigerSiLUMulFunction,
        )
    except ImportError:
        return found

    def liger(activation: Activation, *parts: Tensor) -> Tensor:
        function = LigerSiLUMulFunction if activation is SILU else LigerGELUMulFunction
        return function.apply(*parts)  # type: ignore[no-any-return]

    return [(liger, SILU), (liger, GELU_TANH), *found]


def _prove(module: nn.Module, layout: tuple[str, ...]) -> tuple[Product, Activation] | None:
    """The first product that an MLP can be swapped for, in float32 and in its own dtypes; None if there is none."""
    devices = _devices(module)
    if len(devices) != 1:
        return None
    device = with_numbers(devices[0])
    floats = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    dtypes = {torch.float32, torch.bfloat16} | (floats & {torch.float16})
    for product, activation in _products(devices[0], layout):
        if all(_is_same(module, layout, device, dtype, product, activation) for dtype in dtypes):
            return product, activation
    return None


def _is_same(
    module: nn.Module,
    layout: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    product: Product,
    activation: Activation,
) -> bool:
    """Whether an MLP is what `_forward_of` makes of it."""
    probe = _probe(module, layout)
    ours = _forward_of(probe, layout, product, activation)
    cases = [(scale * noise(2, 3, PROBE_WIDTH)).to(device, dtype) for scale in SCALES]
    return all(
        gap(ours, lambda x: type(module).forward(probe, x), lambda x: activation.plain(x) * x.roll(1, -1), [x])
        is not None
        for x in cases
    )


def _forward_of(
    module: nn.Module, layout: tuple[str, ...], product: Product, activation: Activation
) -> Callable[..., Tensor]:
    """The forward of an MLP by a product that was proven for it; what it was not proven for goes to its own."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return own(*args, **kwargs)  # type: ignore[no-any-return]
        parts = [getattr(module, name)(args[0]) for name in layout]
        shared = Shared() if product is gated_product else None
        multiplied = product(activation, *parts, **({"shared": shared} if shared else {}))
        with computed_again(multiplied, activation, shared, *parts):
            return module.down_proj(multiplied)  # type: ignore[operator, no-any-return]

    return forward
