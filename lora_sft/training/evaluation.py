"""A model and examples → loss, perplexity and token accuracy, as means over the supervised tokens."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_sft.chat import IGNORED
from lora_sft.chat.labels import Example
from lora_sft.console import warn
from lora_sft.training.loss import forward_loss
from lora_sft.training.shortage import let_go


def pad(examples: Sequence[Example], pad_token_id: int, device: Any = "cpu") -> dict[str, Tensor]:
    """Examples → one batch padded on the right: `input_ids`, `attention_mask`, `labels`, each (batch, longest).

    The first label of a row is -100: nothing stands before it, and so it is in no count either.
    """
    shape = len(examples), max(len(example.input_ids) for example in examples)
    input_ids, labels = np.full(shape, pad_token_id), np.full(shape, IGNORED)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(examples):
        here = slice(len(example.input_ids))
        input_ids[row, here], labels[row, here], attention_mask[row, here] = example.input_ids, example.labels, 1
    labels[:, 0] = IGNORED
    columns = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: torch.from_numpy(column).to(device) for name, column in columns.items()}


def batches(
    examples: Sequence[Example], size: int, pad_token_id: int, device: Any = "cpu", rows: Sequence[int] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Examples → padded batches of `size`; `rows` says which ones, and in what order."""
    rows = range(len(examples)) if rows is None else rows
    for start in range(0, len(rows), size):
        yield pad([examples[row] for row in rows[start : start + size]], pad_token_id, device)


class Sums(NamedTuple):
    """Sums over supervised tokens, from which means are made: negative log-likelihood in nats, right ones, all."""

    nll: float
    correct: float
    tokens: float


def measure(model: Any, examples: Sequence[Example], pad_token_id: int, batch_size: int = 8) -> dict[str, float]:
    """{"loss" in nats a token, "perplexity", "token_accuracy", "supervised_tokens"} of a model on examples."""
    sums = sum_up(model, examples, pad_token_id, batch_size)
    mean = sums.nll / max(sums.tokens, 1)
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "token_accuracy": sums.correct / max(sums.tokens, 1),
        "supervised_tokens": int(sums.tokens),
    }


def sum_up(
    model: Any,
    examples: Sequence[Example],
    pad_token_id: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
    shrink: Callable[[int], None] = lambda size: None,
) -> Sums:
    """Sums over the supervised tokens of examples, or of some `rows` of them. The model's mode is left as it was.

    A batch that is out of memory is halved, and so are those after it.

    Args:
        shrink: is told the batch size that is used from then on.

    Raises:
        torch.OutOfMemoryError: one example is too large.
    """
    rows = range(len(examples)) if rows is None else rows
    was_training = model.training
    model.eval()
    sums, start = Sums(0.0, 0.0, 0.0), 0
    try:
        while start < len(rows):
            some = rows[start : start + batch_size]
            found = _sums_of(model, pad([examples[row] for row in some], pad_token_id), len(some) == 1)
            if found is None:
                let_go(model.device)
                batch_size = len(some) // 2
                warn(
                    f"{len(some)} evaluation examples at a time are out of memory on {model.device}; from now on it is "
                    f"{batch_size}, which gives the same result"
                )
                shrink(batch_size)
            else:
                sums = Sums(*(old + new for old, new in zip(sums, found, strict=True)))
                start += len(some)
    finally:
        model.train(was_training)
    return sums


@torch.inference_mode()
def _sums_of(model: Any, batch: dict[str, Tensor], is_one: bool) -> Sums | None:
    """Those of a batch; None if it is out of memory and of several examples."""
    try:
        loss, _ = forward_loss(model, {name: column.to(model.device) for name, column in batch.items()})
        return Sums(loss.nll.item(), loss.correct.item(), loss.tokens.item())
    except torch.OutOfMemoryError:
        if is_one:
            raise
        return None
