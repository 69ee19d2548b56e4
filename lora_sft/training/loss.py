"""Labels and a model → the loss of next-token prediction on the supervised tokens, and how many were right.

Another loss: one function with the signature of `next_token_loss`, and its use in `forward_loss`.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_sft.chat import IGNORED
from lora_sft.kernels.attention import documents
from lora_sft.kernels.head import tap_of

if TYPE_CHECKING:
    from torch.nn import Module


class Loss(NamedTuple):
    """Loss of one micro-batch, with the sums from which means over many are made.

    Attributes:
        value: what is differentiated (scalar).
        nll: negative log-likelihood summed over the supervised tokens, in nats (scalar, no gradient).
        correct: supervised tokens that the model would have chosen (scalar).
        tokens: supervised tokens (scalar).
        entropy: of the predicted distributions, summed over them, in nats (scalar); None where it would cost extra.
    """

    value: Tensor
    nll: Tensor
    correct: Tensor
    tokens: Tensor
    entropy: Tensor | None = None


class Supervised(NamedTuple):
    """Where the supervised tokens of a batch are. All of it can be known before the batch is on its device.

    Attributes:
        positions: (positions,) out of the length: those from which some row predicts a supervised token, in order.
        places: (tokens,) of (batch · positions), row by row: the predictions of supervised tokens among those.
        targets: (tokens,) what is to be predicted there.
    """

    positions: Tensor
    places: Tensor
    targets: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> "Supervised":
        """Those of labels (batch, length)."""
        positions = supervised_positions(labels)
        targets = labels[:, positions + 1].flatten()
        places = (targets != IGNORED).nonzero().flatten()
        return cls(positions, places, targets[places])


def next_token_loss(logits: Tensor, targets: Tensor, token_count: Tensor | int, label_smoothing: float = 0.0) -> Tensor:
    """Mean negative log-likelihood of the supervised tokens, in nats (scalar, float32).

    Args:
        logits: (batch, positions, vocabulary); each predicts the target at the same place.
        targets: (batch, positions); token ids, -100 where nothing is learned.
        token_count: supervised tokens in the whole optimizer step, all micro-batches and ranks together.
        label_smoothing: share of each target that is spread over the vocabulary.

    Raises:
        ValueError: logits and targets differ in batch or positions.

    Source: the division by the count of the whole step is that of `fixed_cross_entropy` in transformers.
    """
    if logits.shape[:2] != targets.shape:
        raise ValueError(
            f"logits are {tuple(logits.shape[:2])}, targets {tuple(targets.shape)}: batch and positions must agree"
        )
    flat, wanted = logits.flatten(0, 1).float(), targets.flatten()
    loss = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
    return loss / token_count


def forward_loss(
    model: "Module", batch: Mapping[str, Any], token_count: Tensor | int | None = None, label_smoothing: float = 0.0
) -> tuple[Loss, object]:
    """Forward pass → loss. The output layer runs only where some row of the batch has a supervised token.

    Args:
        model: a causal language model of transformers, with or without an adapter. Where `swap_head` has put a tap
            before its output layer, no logits are made.
        batch: `input_ids` and `labels`, each (batch, length), and `attention_mask` or what keeps packed examples
            apart; of the latter, the model is given what it takes. The fields of `Supervised` may be there already.
        token_count: as for `next_token_loss`; None divides by this batch's own count.
        label_smoothing: as for `next_token_loss`.

    Returns:
        The loss, and the model's output.
    """
    found = {name: batch[name] for name in Supervised._fields if name in batch}
    supervised = Supervised(**found) if found else Supervised.of(batch["labels"])
    inputs, takes = inputs_of(model, batch), "logits_to_keep" in _parameters(model)
    if takes:
        inputs["logits_to_keep"] = supervised.positions
    # Filled on the device: a number that is copied there would be waited for.
    tokens = torch.full_like(supervised.places[:1].sum(), len(supervised.places))
    divisor = tokens.clamp(min=1) if token_count is None else token_count
    longest = batch.get("max_length_q")
    tap = tap_of(base_of(model))
    if tap is not None:
        with documents(longest), tap.listening() as caught:
            output = model(**inputs, use_cache=False)
        hidden = caught[0] if takes else caught[0][:, supervised.positions]
        sums = tap.loss(hidden.flatten(0, 1)[supervised.places], supervised.targets, label_smoothing)
        return Loss(sums.loss / divisor, sums.nll.detach(), sums.correct, tokens, sums.entropy), output
    with documents(longest):
        output = model(**inputs, use_cache=False)
    logits = output.logits if takes else output.logits[:, supervised.positions]
    targets = torch.full(logits.shape[:2], IGNORED, device=logits.device)
    targets.view(-1)[supervised.places] = supervised.targets
    value = next_token_loss(logits, targets, divisor, label_smoothing)
    with torch.no_grad():
        nll = value.detach() * divisor if not label_smoothing else next_token_loss(logits, targets, 1)
        correct = (logits.argmax(-1) == targets).sum()
    return Loss(value, nll, correct, tokens), output


def supervised_positions(labels: Tensor) -> Tensor:
    """Positions whose next token is supervised in at least one row, in order: (positions,) out of (batch, length).

    At least one position is given, so that a batch without supervised tokens has a loss of 0 and not of nothing.
    """
    positions = (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()
    return positions if len(positions) else positions.new_zeros(1)


def inputs_of(model: "Module", batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch is given to the model: all but what is for the loss, and what its `forward` has no place for."""
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(model).values())
    return {
        name: value
        for name, value in batch.items()
        if name not in ("labels", *Supervised._fields) and (anything or name in _parameters(model))
    }


def base_of(model: Any) -> Any:
    """The model of transformers inside wrappers of several processes and adapters."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _parameters(model: "Module") -> Mapping[str, inspect.Parameter]:
    return inspect.signature(base_of(model).forward).parameters
