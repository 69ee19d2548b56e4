"""Hidden states and the output layer → loss of the supervised tokens, without ever holding their logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_sft.kernels.standing import autocast_of, kind_of, with_numbers
from lora_sft.kernels.swap import Part, Swaps, run_once

TILE_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
"""Logits that are held at a time, in the dtype of the arithmetic."""

BLOCK_BYTES = 1 << 20
"""Of those, on the CPU, what is turned into probabilities at a time in float32: it stays in the cache."""

PROBE = (-40.0, -3.0, -0.5, 0.0, 0.25, 2.0, 30.0)
"""Numbers that are sent through what a model does to its logits behind the output layer."""


class Shaping(NamedTuple):
    """What a model does to its logits: times `scale`, then, with a `softcap` of c, c · tanh(logits / c)."""

    scale: float = 1.0
    softcap: float | None = None


class Sums(NamedTuple):
    """Sums over the tokens of one call (scalars, float32).

    Attributes:
        loss: what is differentiated: cross-entropy with label smoothing, in nats.
        nll: negative log-likelihood in nats, without smoothing or gradient.
        entropy: of the predicted distributions, in nats.
        correct: tokens that the model would have chosen.
    """

    loss: Tensor
    nll: Tensor
    entropy: Tensor
    correct: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    shaping: Shaping = Shaping(),
    label_smoothing: float = 0.0,
) -> Sums:
    """Cross-entropy of softmax(shaped(hidden · weightᵀ + bias)) against the targets, summed.

    The gradient is computed together with the loss, tile by tile, so the logits are multiplied out once: with
    p = softmax, the gradient at the logits is p - (1 - ε) · onehot - ε / vocabulary, times scale · (1 - (l / c)²) where
    the logits l are shaped.

    Args:
        hidden: (tokens, width).
        weight: (vocabulary, width), of any layout; frozen or trained.
        targets: (tokens,) token ids.
        bias: (vocabulary,)
        label_smoothing: ε, the share of the target that is spread over the whole vocabulary.

    Raises:
        ValueError: hidden and targets differ in the number of tokens.

    Source: Cut cross-entropy (arXiv 2411.09009) and Liger (arXiv 2410.10989) compute the gradient in the forward pass.
    """
    if hidden.shape[:1] != targets.shape:
        raise ValueError(f"hidden has {hidden.shape[0]} tokens, targets are {tuple(targets.shape)}")
    device = autocast_of(hidden.device)
    if torch.is_autocast_enabled(device):  # as torch's own linear layer would
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        found = _LinearCrossEntropy.apply(hidden, weight, bias, targets, shaping, label_smoothing)  # type: ignore[no-untyped-call]
        return Sums(*found)


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shaping: Shaping,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, vocabulary = len(hidden), len(weight)
        wanted = ctx.needs_input_grad[:3]
        at_hidden = torch.empty_like(hidden) if wanted[0] else None
        at_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        at_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if wanted[2] else None
        sums = hidden.new_zeros(4, dtype=torch.float32)
        kind = kind_of(hidden.device)
        rows = max(1, min(tokens, TILE_BYTES.get(kind, TILE_BYTES["cuda"]) // (vocabulary * hidden.itemsize)))
        tile = hidden.new_empty(rows, vocabulary)
        work = _Work(tile, any(wanted), shaping, label_smoothing)
        for start in range(0, tokens, rows):
            here = slice(start, min(start + rows, tokens))
            logits = tile[: here.stop - here.start]
            if bias is None:
                torch.mm(hidden[here], weight.t(), out=logits)
            else:
                torch.addmm(bias, hidden[here], weight.t(), out=logits)
            sums += work.turn(logits, targets[here])  # from here on they are the gradient at the logits
            if at_hidden is not None:
                torch.mm(logits, weight, out=at_hidden[here])
            if at_weight is not None:
                at_weight += logits.t() @ hidden[here]
            if at_bias is not None:
                at_bias += logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(
            at_hidden,
            None if at_weight is None else at_weight.to(weight.dtype),
            None if at_bias is None or bias is None else at_bias.to(bias.dtype),
        )
        loss, nll, entropy, correct = sums.unbind()
        ctx.mark_non_differentiable(nll, entropy, correct)
        return loss, nll, entropy, correct

    @staticmethod
    def backward(ctx: Any, at_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In float32: the factor, one over a count of tokens, would be rounded alike for all of them.
        scaled = [None if found is None else (found.float() * at_loss).to(found.dtype) for found in ctx.saved_tensors]
        return *scaled, None, None, None


class _Work:
    """Turns tiles of logits into the gradient at them, in place, block by block, with buffers that are used again."""

    def __init__(self, tile: Tensor, with_gradient: bool, shaping: Shaping, label_smoothing: float) -> None:
        self.with_gradient, self.shaping, self.smoothing = with_gradient, shaping, label_smoothing
        rows, vocabulary = tile.shape
        self.rows = max(1, min(rows, BLOCK_BYTES // (4 * vocabulary))) if kind_of(tile.device) == "cpu" else rows
        self.logits, self.powers = tile.new_empty(2, self.rows, vocabulary, dtype=torch.float32).unbind()

    def turn(self, tile: Tensor, targets: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) become their gradient → the four `Sums` (4,), not differentiable."""
        found = [
            self._block(tile[start : start + self.rows], targets[start : start + self.rows])
            for start in range(0, len(tile), self.rows)
        ]
        return torch.stack(found).sum(0)

    def _block(self, tile: Tensor, targets: Tensor) -> Tensor:
        rows, vocabulary = tile.shape
        at, powers = targets[:, None], self.powers[:rows]
        logits = self.logits[:rows].copy_(tile)
        scale, softcap = self.shaping
        if scale != 1.0:
            logits *= scale
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        largest, chosen = logits.max(1, keepdim=True)
        logits -= largest
        torch.exp(logits, out=powers)
        total = powers.sum(1, keepdim=True)
        log_total = total.log()
        nll = log_total - logits.gather(1, at)
        # Σ p (log Σ e - l): a product of vectors, so that no third buffer is filled.
        entropy = log_total - torch.bmm(logits[:, None], powers[..., None]).view(rows, 1) / total
        loss = nll
        if self.smoothing:
            loss = torch.lerp(nll, log_total - logits.mean(1, keepdim=True), self.smoothing)
        if self.with_gradient:
            powers /= total
            if self.smoothing:
                powers -= self.smoothing / vocabulary
            powers.scatter_add_(1, at, powers.new_full((), self.smoothing - 1).expand(rows, 1))
            if softcap is not None:
                logits += largest
                powers.addcmul_(powers, logits.div_(softcap).square_(), value=-1)
            if scale != 1.0:
                powers *= scale
            tile.copy_(powers)
        return torch.stack([loss.sum(), nll.sum(), entropy.sum(), (chosen == at).sum().float()])


class HeadTap:
    """Stands before an output layer: while it listens, it keeps what comes in, and no logits are made.

    Attributes:
        head: the output layer.
        shaping: what the model does to its logits.
    """

    def __init__(self, head: nn.Linear, shaping: Shaping) -> None:
        self.head, self.shaping = head, shaping
        self._caught: list[Tensor] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """The forward of the output layer: its logits, or one column in their place."""
        if self._caught is None:
            return nn.Linear.forward(self.head, hidden)
        self._caught.append(hidden)
        return hidden[..., :1]  # whatever the model still does with its logits, it does to one column

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Within, the list gets the hidden states that the output layer is called with."""
        self._caught = []
        try:
            yield self._caught
        finally:
            self._caught = None

    def loss(self, hidden: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Sums:
        """`linear_cross_entropy` with this output layer; hidden (tokens, width), targets (tokens,)."""
        head = self.head
        return linear_cross_entropy(hidden, head.weight, targets, head.bias, self.shaping, label_smoothing)


def tap_of(model: Any) -> HeadTap | None:
    """The tap before a model's output layer, if `swap_head` has put one there."""
    head = model.get_output_embeddings()
    tap = head.__dict__.get("forward") if isinstance(head, nn.Module) else None
    return tap if isinstance(tap, HeadTap) else None


def swap_head(model: Any, swaps: Swaps) -> Part:
    """Puts a tap before the output layer of a causal language model, where its loss can be computed from what comes in.

    Args:
        model: of transformers, with or without an adapter.
    """
    name, head = "loss without logits", model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return Part(name, 0, f"the output layer is {type(head).__name__}")
    shaping = shaping_of(model, head)
    if shaping is None:
        return Part(name, 0, "what this model does to its logits is not known")
    swaps.forward(head, HeadTap(head, shaping))
    return Part(name, 1)


def shaping_of(model: Any, head: nn.Linear) -> Shaping | None:
    """What a model does to its logits, found out by sending numbers through it; None if it is neither of the two."""

    def numbers(hidden: Tensor) -> Tensor:
        probe = torch.tensor(PROBE, device=with_numbers(hidden.device))
        return probe.expand(*hidden.shape[:-1], len(PROBE))

    with Swaps() as swaps:
        swaps.forward(head, numbers)
        try:
            found = run_once(model).logits
        except Exception:  # a model that needs more than token ids, or a vocabulary of its size
            return None
    if found is None or found.shape[-1] != len(PROBE):
        return None
    came, sent = found[0, -1].double().cpu(), torch.tensor(PROBE, dtype=torch.float64)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    slope = float(came[4] / sent[4])
    for shaping in [Shaping(), Shaping(slope), *([Shaping(1.0, float(cap))] if cap else [])]:
        shaped = sent * shaping.scale
        if shaping.softcap is not None:
            shaped = torch.tanh(shaped / shaping.softcap) * shaping.softcap
        if slope > 0 and torch.allclose(came, shaped, rtol=1e-5, atol=1e-6):
            return shaping
    return None
