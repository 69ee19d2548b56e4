"""A model and examples → loss, perplexity and token accuracy, as means over the supervised tokens."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_sft.chat import IGNORED
from lora_sft.chat.labels import Example
from lora_sft.training.loss import forward_loss


def pad(examples: Sequence[Example], pad_token_id: int, device: Any = "cpu") -> dict[str, Tensor]:
    """Examples → one batch padded on the right: `input_ids`, `attention_mask`, `labels`, each (batch, longest)."""
    longest = max(len(example.input_ids) for example in examples)

    def column(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=device)

    return {
        "input_ids": column([example.input_ids for example in examples], pad_token_id),
        "attention_mask": column([[1] * len(example.input_ids) for example in examples], 0),
        "labels": column([example.labels for example in examples], IGNORED),
    }


def batches(
    examples: Sequence[Example], size: int, pad_token_id: int, device: Any = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Examples in order → padded batches of `size`."""
    for start in range(0, len(examples), size):
        yield pad(examples[start : start + size], pad_token_id, device)


def measure(model: Any, examples: Sequence[Example], pad_token_id: int, batch_size: int = 8) -> dict[str, float]:
    """{"loss" in nats a token, "perplexity", "token_accuracy", "supervised_tokens"} of a model on examples.

    The model's mode is left as it was.
    """
    was_training = model.training
    model.eval()
    nll = correct = tokens = 0.0
    try:
        with torch.inference_mode():
            for batch in batches(examples, batch_size, pad_token_id, model.device):
                loss, _ = forward_loss(model, batch)
                nll += loss.nll.item()
                correct += loss.correct.item()
                tokens += loss.tokens.item()
    finally:
        model.train(was_training)
    mean = nll / max(tokens, 1)
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "token_accuracy": correct / max(tokens, 1),
        "supervised_tokens": int(tokens),
    }
