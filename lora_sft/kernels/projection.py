"""A linear layer with a LoRA adapter → the same in one function whose gradients are derived by hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_sft.kernels.swap import Part, Swaps


def lora_projection(
    inputs: Tensor, weight: Callable[[], Tensor], bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """y = x · Wᵀ + bias + scaling · (x · Aᵀ) · Bᵀ, of shape (…, outputs).

    With g the gradient at y and u = scaling · g · B, those at x, A and B are g · W + u · A, uᵀ · x and
    scaling · gᵀ · (x · Aᵀ). W is frozen: it is asked for once forward and, where x needs a gradient, once backward, so
    that a quantized one is held only as long as a product is made with it.

    Args:
        inputs: x (…, inputs), in the dtype of the arithmetic.
        weight: gives W (outputs, inputs) in that dtype.
        bias: (outputs,), frozen.
        a, b: A (rank, inputs) and B (outputs, rank), of any dtype; their gradients have it too.
    """
    found: Tensor = _LoraProjection.apply(inputs, weight, bias, a, b, scaling)  # type: ignore[no-untyped-call]
    return found


class _LoraProjection(torch.autograd.Function):
    """`lora_projection`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        rows = inputs.flatten(0, -2)
        down = rows @ a.to(rows.dtype).t()
        whole = weight()
        found = rows @ whole.t() if bias is None else torch.addmm(bias, rows, whole.t())
        del whole
        found.addmm_(down, b.to(rows.dtype).t(), alpha=scaling)
        ctx.save_for_backward(inputs, down, a, b)
        ctx.weight, ctx.scaling = weight, scaling
        return found.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, at_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, down, a, b = ctx.saved_tensors
        rows, at_rows = inputs.flatten(0, -2), at_outputs.flatten(0, -2).to(inputs.dtype)
        up = (at_rows @ b.to(rows.dtype)).mul_(ctx.scaling)
        at_a = (up.t() @ rows).to(a.dtype) if ctx.needs_input_grad[3] else None
        at_b = (at_rows.t() @ down).to(b.dtype).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        at_inputs = None
        if ctx.needs_input_grad[0]:
            at_inputs = (at_rows @ ctx.weight()).addmm_(up, a.to(rows.dtype)).view(inputs.shape)
        return at_inputs, None, None, at_a, at_b, None


def swap_projections(model: Any, swaps: Swaps) -> Part:
    """Gives every plain LoRA layer of PEFT `lora_projection` as its forward.

    Left as they are: variants such as DoRA, dropout, biases that are trained, layers of other kinds, and bases in
    8 bits, whose arithmetic bitsandbytes does itself.
    """
    from peft.tuners.lora.layer import LoraLayer

    engaged, reasons = 0, set()
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        if why_not := _why_not(module):
            reasons.add(why_not)
        else:
            swaps.forward(module, _forward_of(module))
            engaged += 1
    return Part("LoRA projections", engaged, ", ".join(sorted(reasons)))


def _why_not(module: Any) -> str | None:
    """Why a LoRA layer keeps its own forward; None if it need not."""
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
    from peft.tuners.lora.layer import Linear

    base = module.base_layer
    if type(module) not in (Linear, LoraLinear4bit) or type(base) not in (nn.Linear, Linear4bit):
        return f"adapters on {type(base).__name__} stay as they are"
    if list(module.active_adapters) != ["default"] or "default" not in module.lora_A:
        return "several adapters stay as they are"
    if module.lora_variant:
        return f"{type(module.lora_variant['default']).__name__.removesuffix('Variant')} stays as it is"
    if not isinstance(module.lora_dropout["default"], nn.Identity):
        return "adapters with dropout stay as they are"
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    if trained or module.lora_B["default"].bias is not None or getattr(module, "fan_in_fan_out", False):
        return "adapters beside a trained base stay as they are"
    return None


def _forward_of(module: Any) -> Callable[..., Tensor]:
    """The forward of a LoRA layer, by `lora_projection`; what it is not made for goes to the layer's own."""
    own = type(module).forward
    a, b, base, scaling = module.lora_A["default"], module.lora_B["default"], module.base_layer, module.scaling

    def forward(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or module.disable_adapters or module.merged or module.active_adapters != ["default"]:
            return own(module, inputs, *args, **kwargs)  # type: ignore[no-any-return]
        given = inputs.dtype
        dtype = _dtype_of(base, inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            bias = None if base.bias is None else base.bias.to(dtype)
            weight = _weight_of(base, dtype)
            found = lora_projection(inputs.to(dtype), weight, bias, a.weight, b.weight, scaling["default"])
        return found if torch.is_autocast_enabled(inputs.device.type) else found.to(given)

    return forward


def _dtype_of(base: nn.Module, inputs: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, as the layer itself would choose it."""
    if torch.is_autocast_enabled(inputs.device.type):
        return torch.get_autocast_dtype(inputs.device.type)
    asked: torch.dtype | None = getattr(base, "compute_dtype", None)  # of a 4-bit layer
    return inputs.dtype if asked is None else asked


def _weight_of(base: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    """What gives the base layer's weight (outputs, inputs)."""
    weight = base.weight
    if getattr(weight, "quant_state", None) is None:
        return lambda: weight.detach().to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return lambda: dequantize_4bit(weight.data, weight.quant_state).to(dtype)
