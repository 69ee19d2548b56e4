"""A module → the same module with another `forward`, on this one instance, until it is put back."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn


class Part(NamedTuple):
    """What became of one fast part in one model.

    Attributes:
        name: what it is called in words: `LoRA projections`.
        engaged: modules in which it is used now.
        left: why others, that look as if they could take it, were left as they were; empty if none were.
    """

    name: str
    engaged: int
    left: str = ""

    def __str__(self) -> str:
        return f"{self.name} ×{self.engaged}" + (f" ({self.left})" if self.left else "")


class Swaps(AbstractContextManager["Swaps"]):
    """The forwards that were swapped; on leaving, or with `undo`, every module has its own again."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Gives a module another forward: a function of what the module is called with (without `self`)."""
        before = module.__dict__.get("forward")  # a hook of accelerate, say

        def put_back() -> None:
            if before is None:
                del module.forward
            else:
                module.forward = before

        module.forward = forward
        self._undo.append(put_back)

    def also(self, put_back: Callable[[], None]) -> None:
        """Something else that was changed, and what puts it back."""
        self._undo.append(put_back)

    def undo(self) -> None:
        """Puts everything back, the last change first."""
        while self._undo:
            self._undo.pop()()

    def __exit__(self, *_: object) -> None:
        self.undo()


@contextmanager
def left_as_it_was(model: Any) -> Iterator[None]:
    """Without gradients; afterwards every module is in its mode again, and the random generators where they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def run_once(model: Any) -> Any:
    """Two tokens through a causal language model of transformers in eval mode → what it gives back."""
    with left_as_it_was(model):
        model.eval()
        return model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
