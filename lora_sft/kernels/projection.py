"""Linear layers with LoRA adapters → the same in one function whose gradients are derived by hand.

Layers that are given the same tensor, such as the projections to queries, keys and values, are computed together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_sft.kernels.standing import autocast_of
from lora_sft.kernels.swap import Part, Swaps, run_once


class Layer(NamedTuple):
    """A frozen linear layer and its update.

    Attributes:
        weight: gives W (outputs, inputs) in the dtype of the arithmetic, anew each time: a quantized one is held only
            as long as a product is made with it.
        bias: (outputs,) or None.
        a, b: A (rank, inputs) and B (outputs, rank), of any dtype; their gradients have it too.
        scaling: of the update.
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float


def lora_projections(inputs: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """y = x · Wᵀ + bias + scaling · (x · Aᵀ) · Bᵀ of each layer, (…, outputs).

    With g the gradient at a layer's y and u = scaling · g · B, those at its A and B are uᵀ · x and
    scaling · gᵀ · (x · Aᵀ), and the one at x is the sum of g · W + u · A over the layers. The A of all layers are
    stacked for one product with x forward and two products backward. Each W is asked for once forward and, where x
    needs a gradient, once backward.

    Args:
        inputs: x (…, inputs), in the dtype of the arithmetic.
        layers: those that take it.
    """
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    factors = [one for layer in layers for one in (layer.a, layer.b)]
    found = _LoraProjections.apply(inputs, weights, biases, [layer.scaling for layer in layers], *factors)  # type: ignore[no-untyped-call]
    return tuple(found)


class _LoraProjections(torch.autograd.Function):
    """`lora_projections`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weights: Sequence[Callable[[], Tensor]],
        biases: Sequence[Tensor | None],
        scalings: Sequence[float],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        rows, every_b = inputs.flatten(0, -2), factors[1::2]
        ranks = [len(a) for a in factors[::2]]
        # Each by itself in memory: products with columns of a wider matrix are slower than these small copies.
        every_down = [one.contiguous() for one in (rows @ _stacked(factors[::2], rows.dtype).t()).split(ranks, dim=1)]  # type: ignore[no-untyped-call]
        found = []
        for weight, bias, b, scaling, down in zip(weights, biases, every_b, scalings, every_down, strict=True):
            whole = weight()
            outputs = rows @ whole.t() if bias is None else torch.addmm(bias, rows, whole.t())
            outputs.addmm_(down, b.to(rows.dtype).t(), alpha=scaling)
            found.append(outputs.view(*inputs.shape[:-1], -1))
        ctx.save_for_backward(inputs, *every_down, *factors)
        ctx.weights, ctx.scalings, ctx.ranks = weights, scalings, ranks
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *at_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, *saved = ctx.saved_tensors
        every_down, factors = saved[: len(ctx.ranks)], saved[len(ctx.ranks) :]
        rows, every_a = inputs.flatten(0, -2), factors[::2]
        every_up, every_at_b = [], []
        arrived = [None if one is None else one.flatten(0, -2).to(rows.dtype) for one in at_outputs]
        for at_rows, down, b, scaling in zip(arrived, every_down, factors[1::2], ctx.scalings, strict=True):
            every_up.append(torch.zeros_like(down) if at_rows is None else (at_rows @ b.to(rows.dtype)).mul_(scaling))
            every_at_b.append(None if at_rows is None else (at_rows.t() @ down).to(b.dtype).mul_(scaling))
        up = every_up[0] if len(every_up) == 1 else torch.cat(every_up, dim=1)
        every_at_a = (up.t() @ rows).split(ctx.ranks)
        at_factors = [
            one
            for at_a, a, at_b in zip(every_at_a, every_a, every_at_b, strict=True)
            for one in (at_a.to(a.dtype), at_b)
        ]
        at_inputs = None
        if ctx.needs_input_grad[0]:
            at_inputs = up @ _stacked(every_a, rows.dtype)
            for at_rows, weight in zip(arrived, ctx.weights, strict=True):
                if at_rows is not None:
                    at_inputs.addmm_(at_rows, weight())
            at_inputs = at_inputs.view(inputs.shape)
        return at_inputs, None, None, None, *at_factors


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One above the other."""
    return matrices[0].to(dtype) if len(matrices) == 1 else torch.cat([one.to(dtype) for one in matrices])


def swap_projections(model: Any, swaps: Swaps) -> Part:
    """Gives every plain LoRA layer of PEFT `lora_projections` as its forward.

    Which of them are given the same tensor is seen by running the model once. Left as they are: variants such as DoRA,
    dropout, biases that are trained, layers of other kinds, and bases in 8 bits, whose arithmetic bitsandbytes does
    itself.
    """
    from peft.tuners.lora.layer import LoraLayer

    layers, reasons = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if why_not := _why_not(module):
                reasons.add(why_not)
            else:
                layers[name] = module
    for names in _sharing(model, layers):
        group = _Group([layers[name] for name in names])
        for place, name in enumerate(names):
            swaps.forward(layers[name], group.forward_of(place))
    return Part("LoRA projections", len(layers), ", ".join(sorted(reasons)))


def _sharing(model: Any, layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """The layers in groups: those of one parent that are called one after the other with the same tensor, else each
    alone."""
    calls: list[tuple[str, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0])) if args else None)
        for name, layer in layers.items()
    ]
    try:
        run_once(model)
    except Exception:  # a model that needs more than token ids
        calls = []
    finally:
        for hook in hooks:
            hook.remove()
    seen = [name for name, _ in calls]
    groups = [[name] for name in layers if seen.count(name) != 1]
    before: tuple[str, Tensor] | None = None
    for name, given in calls:
        if seen.count(name) == 1:
            parent = name.rpartition(".")[0]
            together = before is not None and before[1] is given and before[0].rpartition(".")[0] == parent
            if together:
                groups[-1].append(name)
            else:
                groups.append([name])
            before = name, given
    return groups


class _Group:
    """LoRA layers that are given one tensor: the first that is called computes all, and the others find their outputs.

    Attributes:
        modules: in the order in which they are called.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = modules
        self._given: tuple[Tensor, bool] | None = None
        self._waiting: dict[int, Tensor] = {}

    def forward_of(self, place: int) -> Callable[..., Tensor]:
        """The forward of one of them; what it is not made for goes to the layer's own."""
        module = self.modules[place]
        own = type(module).forward

        def forward(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs or _is_off(module):
                return own(module, inputs, *args, **kwargs)  # type: ignore[no-any-return]
            given = self._given
            is_theirs = given is not None and given[0] is inputs and given[1] == torch.is_grad_enabled()
            if is_theirs and place in self._waiting:
                found = self._waiting.pop(place)
                self._given = given if self._waiting else None
                return found
            if place or any(_is_off(one) for one in self.modules):
                return _run(inputs, [module])[0]
            first, *others = _run(inputs, self.modules)
            self._waiting = dict(enumerate(others, start=1))
            self._given = (inputs, torch.is_grad_enabled()) if others else None
            return first

        return forward


def _is_off(module: Any) -> bool:
    return bool(module.disable_adapters or module.merged or module.active_adapters != ["default"])


def _run(inputs: Tensor, modules: Sequence[Any]) -> list[Tensor]:
    """The outputs of LoRA layers, in the dtype that their own forwards would give."""
    given, dtype, device = inputs.dtype, _dtype_of(modules[0].base_layer, inputs), autocast_of(inputs.device)
    with torch.autocast(device, enabled=False):
        found = lora_projections(inputs.to(dtype), [_layer_of(module, dtype) for module in modules])
    return list(found) if torch.is_autocast_enabled(device) else [one.to(given) for one in found]


def _layer_of(module: Any, dtype: torch.dtype) -> Layer:
    base, bias = module.base_layer, module.base_layer.bias
    return Layer(
        _weight_of(base, dtype),
        None if bias is None else bias.to(dtype),
        module.lora_A["default"].weight,
        module.lora_B["default"].weight,
        module.scaling["default"],
    )


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


def _dtype_of(base: nn.Module, inputs: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, as the layer itself would choose it."""
    if torch.is_autocast_enabled(autocast_of(inputs.device)):
        return torch.get_autocast_dtype(autocast_of(inputs.device))
    asked: torch.dtype | None = getattr(base, "compute_dtype", None)  # of a 4-bit layer
    return inputs.dtype if asked is None else asked


def _weight_of(base: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    """What gives the base layer's weight (outputs, inputs)."""
    weight = base.weight
    if getattr(weight, "quant_state", None) is None:
        return lambda: weight.detach().to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return lambda: dequantize_4bit(weight.data, weight.quant_state).to(dtype)
