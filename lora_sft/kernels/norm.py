"""A model's RMSNorm layers → the same, made of one function whose gradients are derived by hand."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_sft.kernels.blocks import blocks_of, rows_at_a_time
from lora_sft.kernels.proof import gap, likeness, noise
from lora_sft.kernels.standing import kind_of, with_numbers
from lora_sft.kernels.swap import Part, Swaps

EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_eps", "rms_norm_eps")
"""Where RMSNorm layers keep theirs."""

SMALLEST_SCALE = 1e-4
"""Of a weight by which the output can be divided to have the normalized input again."""

SCALES = (1e-3, 1.0, 30.0)
"""Of the inputs on which a layer is proven; at the first one ε counts."""


class Kind(NamedTuple):
    """A way to end an RMSNorm, with x̂ = x / sqrt(mean(x²) + ε) in float32.

    Attributes:
        offset: 1 if the layer multiplies by 1 + weight (Gemma), or 0.
        rounded: whether x̂ is cast to the dtype of x and then multiplied (Llama), or the product is cast (Gemma, OLMo).
    """

    offset: float
    rounded: bool


KINDS = (Kind(0.0, True), Kind(0.0, False), Kind(1.0, False))

Norm = Callable[[Tensor, Tensor, float, Kind], Tensor]


def rms_norm(inputs: Tensor, weight: Tensor, eps: float, kind: Kind = KINDS[0]) -> Tensor:
    """y = s ∘ x̂ with x̂ = ρ x, ρ = 1 / sqrt(mean(x²) + ε) and s = offset + weight, row by row.

    With g the gradient at y and h = s ∘ g, that at x is ρ (h - x̂ mean(h ∘ x̂)), because ∂ρ/∂x = -ρ³ x / width; the one
    at the weight is the sum of g ∘ x̂ over the rows. Held for it: ρ, and one tensor of the size of x. That is y where x̂
    can be had from it (y / s), because the layers that y goes to hold it anyway; x elsewhere.

    Args:
        inputs: x (…, width), float16, bfloat16 or float32.
        weight: (width,), frozen or trained.

    Returns:
        y (…, width): of the dtype of x times weight if x̂ is rounded first, of that of x if not.

    Source: Root Mean Square Layer Normalization (arXiv 1910.07467).
    """
    return _RMSNorm.apply(inputs, weight, eps, kind)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """`rms_norm`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, eps: float, kind: Kind) -> Tensor:
        dtype = torch.promote_types(inputs.dtype, weight.dtype) if kind.rounded else inputs.dtype
        found = torch.empty(inputs.shape, dtype=dtype, device=inputs.device)
        scale = weight.float() + kind.offset
        reciprocal = _forward(inputs, found, scale.to(dtype) if kind.rounded else scale, eps, kind.rounded)
        ctx.from_output = _is_in(found, inputs, scale, kind) and not ctx.needs_input_grad[1]
        ctx.offset = kind.offset
        ctx.save_for_backward(found if ctx.from_output else inputs, weight, reciprocal)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_outputs: Tensor) -> tuple[Tensor | None, ...]:
        held, weight, reciprocal = ctx.saved_tensors
        at_inputs = torch.empty(held.shape, dtype=held.dtype, device=held.device)
        at_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
        scale = weight.float() + ctx.offset
        _backward(
            at_outputs, held, scale, scale.reciprocal() if ctx.from_output else None, reciprocal, at_inputs, at_weight
        )
        return at_inputs, None if at_weight is None else at_weight.to(weight.dtype), None, None


def _is_in(found: Tensor, inputs: Tensor, scale: Tensor, kind: Kind) -> bool:
    """Whether the normalized input can be had from the output, as exactly as the layer itself rounds it.

    Not in float16, whose small numbers lose their digits, and only where looking at the weight does not wait for a GPU.
    """
    if found.dtype != inputs.dtype or inputs.dtype == torch.float16 or kind_of(inputs.device) != "cpu":
        return False
    if not kind.rounded and inputs.dtype != torch.float32:
        return False
    return scale.is_meta or float(scale.abs().min()) >= SMALLEST_SCALE  # without numbers: as models begin, with ones


def _buffers(like: Tensor, count: int) -> Tensor:
    """So many blocks in float32: (count, rows of a block, width)."""
    width = like.shape[-1]
    rows = min(rows_at_a_time(width, like.device), like.numel() // width)
    return torch.empty(count, rows, width, device=like.device)


def _forward(inputs: Tensor, found: Tensor, scale: Tensor, eps: float, rounded: bool) -> Tensor:
    """Writes the outputs → ρ (rows, 1)."""
    reciprocal = torch.empty(inputs.numel() // inputs.shape[-1], 1, device=inputs.device)
    buffers = _buffers(inputs, 2)
    for x, y, rho in blocks_of(inputs, found, reciprocal):
        wide, square = buffers[:, : len(x)]
        source = x if x.dtype == torch.float32 else wide.copy_(x)
        # Not vector_norm, which is faster and, for rows of 8192, twice as far from float64 as this.
        torch.mean(torch.mul(source, source, out=square), -1, keepdim=True, out=rho).add_(eps).rsqrt_()
        torch.mul(source, rho, out=wide)
        if not rounded:
            y.copy_(wide.mul_(scale))
        else:
            y.copy_(wide if x.dtype == y.dtype else wide.to(x.dtype)).mul_(scale)
    return reciprocal


def _backward(
    at_outputs: Tensor,
    held: Tensor,
    scale: Tensor,
    divisor: Tensor | None,
    reciprocal: Tensor,
    at_inputs: Tensor,
    at_scale: Tensor | None,
) -> None:
    """Writes the gradient at the inputs and adds to that at the scale; `held` is y with a divisor, x without."""
    buffers = _buffers(held, 3)
    for g, kept, rho, at_x in blocks_of(at_outputs, held, reciprocal, at_inputs):
        h, unit, product = buffers[:, : len(g)]
        h.copy_(g)
        unit.copy_(kept).mul_(rho if divisor is None else divisor)
        if at_scale is not None:
            at_scale += torch.mul(h, unit, out=product).sum(0)
        h.mul_(scale)
        mean = torch.mul(h, unit, out=product).mean(-1, keepdim=True)
        at_x.copy_(h.addcmul_(unit, mean, value=-1).mul_(rho))


def swap_norms(model: nn.Module, swaps: Swaps) -> Part:
    """Gives RMSNorm layers `rms_norm`, or Liger's kernel on a GPU where that is installed, as their forward.

    A layer is one whose class says so by name, with one weight (width,) and an ε. Each sort is proven first: values and
    gradients on random inputs, against the layer's own. What is not proven keeps its own and is named.
    """
    proven: dict[tuple[Any, ...], dict[torch.dtype, tuple[Norm, Kind]]] = {}
    engaged, left = 0, set()
    for module in model.modules():
        if "rmsnorm" not in type(module).__name__.lower():
            continue
        weight, eps = getattr(module, "weight", None), _epsilon(module)
        if not _is_plain(module) or weight is None or eps is None:
            left.add(f"{type(module).__name__} stays as it is")
            continue
        sort = likeness(module)
        if sort not in proven:
            proven[sort] = _prove(module, weight, eps)
        if {torch.float32, weight.dtype} <= proven[sort].keys():
            swaps.forward(module, _forward_of(module, eps, proven[sort]))
            engaged += 1
        else:
            left.add(f"{type(module).__name__} computes something else")
    return Part("RMSNorm", engaged, ", ".join(sorted(left)))


def _epsilon(module: nn.Module) -> float | None:
    """The layer's ε, if it has one under a name in use."""
    found = [vars(module)[name] for name in EPSILONS if isinstance(vars(module).get(name), float)]
    return found[0] if len(found) == 1 else None


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer holds one weight (width,) in memory, nothing below it, and its own forward."""
    tensors = [*module.parameters(), *module.buffers()]
    if len(tensors) != 1 or any(module.children()) or "forward" in vars(module):
        return False
    (weight,) = tensors
    return type(weight.data) is Tensor and weight.dim() == 1 and weight.numel() > 0


def _norms(device: torch.device) -> list[Norm]:
    """What may compute an RMSNorm there, the fastest first."""
    if kind_of(device) == "cuda":
        try:
            from liger_kernel.ops import LigerRMSNormFunction  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            return [rms_norm]

        def liger(inputs: Tensor, weight: Tensor, eps: float, kind: Kind) -> Tensor:
            casting = "llama" if kind.rounded else "gemma"
            # In place would write into the gradient of a sum, which others still read.
            return LigerRMSNormFunction.apply(inputs, weight, eps, kind.offset, casting, False)  # type: ignore[no-any-return]

        return [liger, rms_norm]
    return [rms_norm]


def _prove(module: nn.Module, weight: Tensor, eps: float) -> dict[torch.dtype, tuple[Norm, Kind]]:
    """For every dtype of the inputs, the first norm that a layer can be swapped for, of the nearest kind."""
    found = {}
    for dtype in {torch.float32, torch.bfloat16, weight.dtype}:
        for norm in _norms(weight.device):
            gaps = {
                kind: apart for kind in KINDS if (apart := _gap(module, weight, eps, dtype, norm, kind)) is not None
            }
            if gaps:
                found[dtype] = norm, min(gaps, key=lambda kind: gaps[kind])
                break
    return found


def _gap(module: nn.Module, weight: Tensor, eps: float, dtype: torch.dtype, norm: Norm, kind: Kind) -> float | None:
    """How far a norm is from a layer's own, with another weight; None if it is not the same."""
    probe = copy.copy(module)

    def own(inputs: Tensor, weight: Tensor) -> Tensor:
        probe.__dict__["_parameters"] = {"weight": weight}
        return type(module).forward(probe, inputs)  # type: ignore[no-any-return]

    def exact(inputs: Tensor, weight: Tensor) -> Tensor:
        return (weight + kind.offset) * inputs * (inputs.square().mean(-1, keepdim=True) + eps).rsqrt()

    furthest, device = 0.0, with_numbers(weight.device)
    for scale in SCALES:
        inputs = (scale * noise(2, 8, len(weight))).to(device, dtype)
        other = (1 + noise(len(weight), seed=2) / 4).to(device, weight.dtype)
        one = gap(lambda x, w: norm(x, w, eps, kind), own, exact, [inputs, other])
        if one is None:
            return None
        furthest = max(furthest, one)
    return furthest


def _forward_of(module: nn.Module, eps: float, proven: dict[torch.dtype, tuple[Norm, Kind]]) -> Callable[..., Tensor]:
    """The forward of a layer by what was proven for it; what it was not proven for goes to its own."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or args[0].dtype not in proven:
            return own(*args, **kwargs)  # type: ignore[no-any-return]
        norm, kind = proven[args[0].dtype]
        return norm(args[0], module.weight, eps, kind)  # type: ignore[arg-type]

    return forward
