"""A model that is about to be trained → the same with its fast parts, as far as they are proven on rows of its own.

Each part swaps the forward of single modules of this one model and is undone at the end of the run. Before any of them
counts, a small batch of the user's rows goes through the model twice, without them and with them: where loss and
gradients differ by more than rounding, they are taken out again, and it is said.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from lora_sft.chat import IGNORED
from lora_sft.chat.labels import Example
from lora_sft.console import say, warn
from lora_sft.kernels.attention import swap_attention
from lora_sft.kernels.gated import swap_gated
from lora_sft.kernels.head import swap_head
from lora_sft.kernels.norm import swap_norms
from lora_sft.kernels.projection import swap_projections
from lora_sft.kernels.swap import Part, Swaps, left_as_it_was
from lora_sft.training.batching import Batching, lay_in_rows
from lora_sft.training.evaluation import pad
from lora_sft.training.loss import forward_loss

PARTS: tuple[Callable[[Any, Swaps], Part], ...] = (
    swap_projections,
    swap_norms,
    swap_gated,
    swap_head,
    swap_attention,
)
"""A further one: a function of a model, and this line."""

ROWS, TOKENS = 2, 64
"""Of the batch that the proof is made on: examples, and tokens of each at most."""

ROUNDING = {torch.float32: (1e-5, 1e-3), torch.float16: (2e-3, 0.03), torch.bfloat16: (5e-3, 0.1)}
"""What counts as rounding, relative: of the loss, and of all gradients together (the length of their difference). Two
plain forms of one step, padded and not, differ by a tenth of that; a forgotten factor, mask or term by far more."""


class Measured(NamedTuple):
    """Loss of the small batch, and the gradient of every trained parameter: {name: gradient}."""

    loss: float
    gradients: dict[str, Tensor]


class Distance(NamedTuple):
    """How far two measurements are apart, relative to the first: the loss, and the gradients together."""

    loss: float
    gradients: float

    def is_rounding(self, dtype: torch.dtype) -> bool:
        """Whether it can be rounding in this arithmetic."""
        of_loss, of_gradients = ROUNDING[dtype]
        return self.loss <= of_loss and self.gradients <= of_gradients

    def __str__(self) -> str:
        return f"{self.loss:.1g} in the loss and {self.gradients:.1g} in the gradients"


class Quickened(NamedTuple):
    """What became of the fast parts.

    Attributes:
        batching: how micro-batches are made for the model as it is left.
        engaged: the parts that are used now, in words; empty if all were taken out again.
        distance: of a step with them from the plain model's, on rows of the data.
    """

    batching: Batching
    engaged: str
    distance: Distance


def quicken(
    model: Any,
    examples: Sequence[Example],
    pad_token_id: int,
    settle: Callable[[], Batching],
    swaps: Swaps,
    autocast: torch.dtype | None,
) -> Quickened:
    """Swaps in the fast parts, proves them, and says what became of them.

    Args:
        model: with its adapter, which is left as it is.
        examples: those that will be trained on.
        settle: how micro-batches are to be made for the model as it is then; packing and rows without padding are
            proven in it.
        swaps: gets all that was swapped.
        autocast: the dtype of the arithmetic, if it is not that of the weights.
    """
    rows = [shortened(examples[index], TOKENS) for index in range(min(ROWS, len(examples)))]
    with _left_for_proof(model):
        plain = _measure(model, pad(rows, pad_token_id), autocast)
    parts = [swap(model, swaps) for swap in PARTS]
    batching = settle()
    with _left_for_proof(model):
        batch = lay_in_rows(rows, batching, pad_token_id) if batching.one_row else pad(rows, pad_token_id)
        distance = compare(plain, _measure(model, batch, autocast))
    # All processes or none: they must compute alike.
    if all(gather_object([distance.is_rounding(autocast or model.dtype)])):
        engaged = ", ".join(str(part) for part in parts if part.engaged)
        say("fast", f"{engaged}; the plain model's step differs by {distance}")
        if left := "; ".join(f"{part.name}: {part.left}" for part in parts if part.left):
            say("fast", f"left as they are: {left}")
        return Quickened(batching, engaged, distance)
    swaps.undo()
    warn(
        f"the fast parts are off: a step with them differs from the plain model's by {distance}, more than rounding "
        "(or did in another process)"
    )
    return Quickened(settle(), "", distance)


def compare(plain: Measured, other: Measured) -> Distance:
    """How far `other` is from `plain`; infinitely if a gradient is missing or no number."""
    if plain.gradients.keys() != other.gradients.keys():
        return Distance(math.inf, math.inf)
    there = sum(float(gradient.double().square().sum()) for gradient in plain.gradients.values())
    apart = sum(
        float((gradient.double() - other.gradients[name].double()).square().sum())
        for name, gradient in plain.gradients.items()
    )
    found = Distance(abs(other.loss - plain.loss) / max(abs(plain.loss), 1e-6), math.sqrt(apart / max(there, 1e-30)))
    return found if all(map(math.isfinite, found)) else Distance(math.inf, math.inf)


def shortened(example: Example, tokens: int) -> Example:
    """At most so many tokens of an example, with the first that is learned near their middle."""
    first = next((place for place, label in enumerate(example.labels) if label != IGNORED), 0)
    start = max(0, min(first - tokens // 2, len(example.input_ids) - tokens))
    return Example(example.input_ids[start : start + tokens], example.labels[start : start + tokens])


def _measure(model: Any, batch: Mapping[str, Any], autocast: torch.dtype | None) -> Measured:
    """One forward and backward pass in eval mode."""
    device = model.device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with torch.enable_grad():
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            loss, _ = forward_loss(model, moved)
        loss.value.backward()  # type: ignore[no-untyped-call]
    return Measured(float(loss.value.detach()), take_gradients(model))


def take_gradients(model: Any) -> dict[str, Tensor]:
    """{name: gradient} of all parameters that have one; afterwards none has."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


@contextmanager
def _left_for_proof(model: Any) -> Iterator[None]:
    """The model in eval mode, its zero matrices filled. Afterwards all is as it was."""
    with left_as_it_was(model), filled(model):
        model.eval()
        yield


@contextmanager
def filled(model: Any) -> Iterator[None]:
    """Within, an adapter's zero matrices hold small numbers, since zeros would hide what goes wrong behind them.

    LoRA's B begins with zeros, and so would every gradient of A.
    """
    zeros = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" in name and not parameter.any()
    ]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in zeros:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        yield
    finally:
        for parameter in zeros:
            parameter.data.zero_()
