"""Labels and logits → the loss of next-token prediction on the supervised tokens, and how many were right.

Another loss: one function with the signature of `next_token_loss`, and its use in `trainer.py`.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_sft.chat import IGNORED

if TYPE_CHECKING:
    from torch.nn import Module


class Loss(NamedTuple):
    """Loss of one micro-batch, with the sums from which means over many are made.

    Attributes:
        value: what is differentiated (scalar).
        nll: negative log-likelihood summed over the supervised tokens, in nats (scalar, no gradient).
        correct: supervised tokens that the model would have chosen (scalar).
        tokens: supervised tokens (scalar).
    """

    value: Tensor
    nll: Tensor
    correct: Tensor
    tokens: Tensor


def next_token_loss(logits: Tensor, targets: Tensor, token_count: Tensor | int) -> Tensor:
    """Mean negative log-likelihood of the supervised tokens, in nats (scalar, float32).

    Args:
        logits: (batch, positions, vocabulary); each predicts the target at the same place.
        targets: (batch, positions); token ids, -100 where nothing is learned.
        token_count: supervised tokens in the whole optimizer step, all micro-batches and ranks together.

    Raises:
        ValueError: logits and targets differ in batch or positions.

    Source: the division by the count of the whole step is that of `fixed_cross_entropy` in transformers.
    """
    if logits.shape[:2] != targets.shape:
        raise ValueError(
            f"logits are {tuple(logits.shape[:2])}, targets {tuple(targets.shape)}: batch and positions must agree"
        )
    return (
        F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        / token_count
    )


def forward_loss(
    model: "Module", batch: Mapping[str, Any], token_count: Tensor | int | None = None
) -> tuple[Loss, object]:
    """Forward pass → loss. The output layer runs only where some row of the batch has a supervised token.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        batch: `input_ids` and `labels`, each (batch, length), and `attention_mask` or what keeps packed examples
            apart; of the latter, the model is given what it takes.
        token_count: as for `next_token_loss`; None divides by this batch's own count.

    Returns:
        The loss, and the model's output.
    """
    labels = batch["labels"]
    inputs = inputs_of(model, batch)
    positions = supervised_positions(labels)
    if "logits_to_keep" in _parameters(model):
        output = model(**inputs, use_cache=False, logits_to_keep=positions)
        logits = output.logits
    else:
        output = model(**inputs, use_cache=False)
        logits = output.logits[:, positions]
    targets = labels[:, positions + 1]
    supervised = targets != IGNORED
    tokens = supervised.sum()
    value = next_token_loss(logits, targets, tokens.clamp(min=1) if token_count is None else token_count)
    with torch.no_grad():
        nll = value.detach() * (tokens if token_count is None else token_count)
        correct = ((logits.argmax(-1) == targets) & supervised).sum()
    return Loss(value, nll, correct, tokens), output


def supervised_positions(labels: Tensor) -> Tensor:
    """Positions whose next token is supervised in at least one row, in order: (positions,) out of (batch, length).

    At least one position is given, so that a batch without supervised tokens has a loss of 0 and not of nothing.
    """
    positions = (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()
    return positions if len(positions) else positions.new_zeros(1)


def inputs_of(model: "Module", batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch is given to the model: all but the labels and what its `forward` has no place for."""
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(model).values())
    return {
        name: value for name, value in batch.items() if name != "labels" and (anything or name in _parameters(model))
    }


def _parameters(model: "Module") -> Mapping[str, inspect.Parameter]:
    base: Any = getattr(model, "module", model)  # out of a DDP wrapper
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    return inspect.signature(base.forward).parameters
