"""A module and another way to compute it → whether values and gradients are the same, within rounding."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor]

OWN_ROUNDING = 8
"""Times its dtype's ε: how far a module may be from a formula in float64 and still be said to compute it."""

WORSE = 1.5
"""Times the module's own distance from float64 that another way may be at."""


def gap(ours: Function, own: Function, exact: Function, leaves: Iterable[Tensor]) -> float | None:
    """How far `ours` is from `own` in values and gradients, as a share of their length; None if they are not the same.

    They are where the formula holds for `own` at all, and `ours` is at most 1.5 times as far from it.

    Args:
        ours, own: functions of the leaves.
        exact: the formula, which is given the leaves in float64.
        leaves: what is differentiated by; all of the device and the dtypes of the call that is to be proven.
    """
    leaves = list(leaves)
    try:
        was = _values_and_gradients(own, leaves)
        found = _values_and_gradients(ours, leaves)
        truth = _values_and_gradients(exact, [leaf.double() for leaf in leaves])
    except Exception:  # somebody else's module or kernel may refuse a probe in any way; then nothing is proven
        return None
    furthest = 0.0
    for a, b, c in zip(found, was, truth, strict=True):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return None
        unit = torch.finfo(b.dtype).eps
        distance = apart(b, c)
        if not (distance <= OWN_ROUNDING * unit and apart(a, c) <= max(WORSE * distance, unit / 8)):
            return None
        furthest = max(furthest, apart(a, b))
    return furthest


def apart(found: Tensor, truth: Tensor) -> float:
    """The length of the difference, as a share of the truth's."""
    truth = truth.double()
    return float((found.double() - truth).norm() / truth.norm())


def _values_and_gradients(function: Function, leaves: list[Tensor]) -> list[Tensor]:
    """What a function of the leaves gives, and the gradients at each for one at random (always the same)."""
    device = leaves[0].device
    with ExitStack() as within:
        within.enter_context(torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_kind(device)))
        within.enter_context(torch.enable_grad())
        within.enter_context(torch.autocast(device.type, enabled=False))
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        found = function(*leaves)
        towards = noise(*found.shape, seed=1).to(leaves[0].dtype).to(found)  # the same numbers for every function
        return [found.detach(), *torch.autograd.grad(found, leaves, towards)]


def _kind(device: torch.device) -> str:
    """The device whose random state is kept beside the CPU's."""
    return "cuda" if device.type == "cpu" else device.type


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers (float32, on the CPU), without touching the random state of anything else."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def likeness(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that differ at most in their weights, so that one of them is proven for all."""
    plain = (bool, int, float, str, type(None), torch.dtype)
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    weights = tuple((name, value.shape, value.dtype, value.device) for name, value in module.named_parameters())
    return (
        type(module),
        tuple((name, value if isinstance(value, plain) else id(value)) for name, value in sorted(own.items())),
        tuple((name, repr(child)) for name, child in module.named_children()),
        weights,
    )
