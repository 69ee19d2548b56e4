"""The losses of micro-batches → what was trained on, in sums from which means are made."""

import math
from typing import NamedTuple

from torch import Tensor

from lora_sft.training.loss import Loss


class Tally:
    """Sums over micro-batches, kept on the device so that counting never waits for it."""

    def __init__(self) -> None:
        self.nll: Tensor | float = 0.0
        self.correct: Tensor | int = 0
        self.entropy: Tensor | float = 0.0
        self.supervised: Tensor | int = 0
        self.tokens: Tensor | int = 0

    def add(self, loss: Loss, tokens: Tensor) -> None:
        """Adds one micro-batch; `tokens` is its count of all tokens but padding."""
        self.nll = self.nll + loss.nll
        self.correct = self.correct + loss.correct
        self.entropy = self.entropy + (math.nan if loss.entropy is None else loss.entropy)
        self.supervised = self.supervised + loss.tokens
        self.tokens = self.tokens + tokens


class Seen(NamedTuple):
    """What was trained on: summed negative log-likelihood in nats, right tokens, supervised tokens, all tokens.

    Last the summed entropy of what was predicted, in nats; NaN where the loss does not give it.
    """

    nll: float = 0.0
    correct: int = 0
    supervised: int = 0
    tokens: int = 0
    entropy: float = 0.0

    def plus(self, other: "Seen") -> "Seen":
        """Both together."""
        return Seen(
            self.nll + other.nll,
            self.correct + other.correct,
            self.supervised + other.supervised,
            self.tokens + other.tokens,
            self.entropy + other.entropy,
        )

    @property
    def loss(self) -> float:
        """Mean over the supervised tokens, in nats."""
        return self.nll / max(self.supervised, 1)
