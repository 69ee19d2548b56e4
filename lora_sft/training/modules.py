"""A micro-batch, run with a look behind every module → what each gave, and where the first value is no number."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Look:
    """What came out of one module, or in the backward pass: the gradient that arrived at its output.

    Attributes:
        module: its name in the model; of a gradient that lies in a parameter, the parameter's.
        direction: forward, backward, or gradient (of a parameter).
        shape: of the tensor.
        not_finite: how many of its values are NaN or Inf.
        largest: the largest finite value, without its sign.
        row, token: place of the first NaN or Inf in the micro-batch; None where there is none, or no such place.
    """

    module: str
    direction: str
    shape: tuple[int, ...]
    not_finite: int
    largest: float
    row: int | None = None
    token: int | None = None


def look_behind_modules(model: Any, run: Callable[[], Tensor]) -> tuple[float, list[Look]]:
    """Runs a micro-batch forward and backward → its loss, and a look at every module in the order of the arithmetic.

    The gradients of the model are cleared before and after.

    Args:
        run: computes the loss (scalar, with a gradient).
    """
    looks: list[Look] = []
    hooks = [module.register_forward_hook(_recorder(name, looks)) for name, module in model.named_modules() if name]
    model.zero_grad(set_to_none=True)
    try:
        loss = run()
        value = float(loss.detach())
    finally:
        for hook in hooks:  # gone before the backward pass, in which checkpointed modules run forward again
            hook.remove()
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    looks += [_look(name, "gradient", gradient) for name, gradient in gradients.items()]
    model.zero_grad(set_to_none=True)
    return value, looks


def first_bad(looks: list[Look]) -> Look | None:
    """The first look at a NaN or Inf."""
    return next((look for look in looks if look.not_finite), None)


def _recorder(name: str, looks: list[Look]) -> Callable[[Any, Any, Any], None]:
    def record(module: Any, inputs: Any, output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is None:
            return
        looks.append(_look(name, "forward", tensor))
        if tensor.requires_grad:
            tensor.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: looks.append(_look(name, "backward", gradient))
            )

    return record


def _first_tensor(output: Any) -> Tensor | None:
    """The first tensor of numbers in what a module returned."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def _look(name: str, direction: str, tensor: Tensor) -> Look:
    values = tensor.detach()
    bad = ~torch.isfinite(values)
    count = int(bad.sum())
    row, token = None, None
    if count and direction != "gradient" and values.dim() == 3:  # (rows, tokens, width)
        row, token = bad.any(-1).nonzero()[0].tolist()
    largest = float(values.abs().masked_fill(bad, 0).max()) if values.numel() else 0.0
    return Look(name, direction, tuple(values.shape), count, largest, row, token)
