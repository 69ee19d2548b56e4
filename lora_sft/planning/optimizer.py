"""Settings → the optimizer of the training, on weights without storage."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_sft.config import RunConfig
from lora_sft.planning.simulation import Simulation


class Optimizer:
    """The optimizer that transformers makes of the settings.

    Attributes:
        host_bytes: of its state, what is kept in memory of the host, or is paged between the two.
    """

    def __init__(self, config: RunConfig) -> None:
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(
            output_dir="unused",
            optim=config.optim,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            use_cpu=True,
            report_to="none",
            **{name: value for name, value in config.training_args.items() if name.startswith(("adam_", "optim_"))},
        )
        self._kind, self._options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        self._max_grad_norm = config.max_grad_norm
        self.host_bytes = 0

    def begin(self, trained: Sequence[Tensor], found: Simulation) -> None:
        """Makes the moments, by a step of which nothing stays but them."""
        self._trained = trained
        self.host_bytes, found.phase = 0, "begin"
        options = dict(self._options)
        is_fused = options.pop("fused", False)
        self._inner = self._kind(trained, **options)
        for group in self._inner.param_groups:
            if "fused" in group:  # torch refuses it for weights without storage
                group["fused"], group["foreach"] = is_fused, False
        if getattr(self._inner, "is_paged", False):
            self._inner.get_state_buffer = self._on_host
        for one in trained:
            one.grad = torch.empty_like(one)
        with _fused_without_storage():
            self._inner.step()
        for one in trained:
            one.grad = None
        states = [part for state in self._inner.state.values() for part in state.values() if isinstance(part, Tensor)]
        found.hold((part for part in states if part.is_meta), "optimizer")

    def step(self) -> None:
        """Clips the gradients and updates the weights."""
        if self._max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._trained, self._max_grad_norm)
        with _fused_without_storage():
            self._inner.step()

    def _on_host(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """bitsandbytes' `get_state_buffer` of paged optimizers: large states are in memory that CUDA pages."""
        if weight.numel() < 100_000:
            return torch.zeros_like(weight, dtype=dtype)
        self.host_bytes += weight.numel() * dtype.itemsize
        return torch.zeros((), dtype=dtype, device="meta").expand(weight.shape)


@contextmanager
def _fused_without_storage() -> Iterator[None]:
    """torch 2.13 asks whether a device has fused kernels; here the step of the device that is stood for is meant."""
    import torch.optim.adam as adam

    before: Any = adam._device_dtype_check_for_fused  # type: ignore[attr-defined]
    adam._device_dtype_check_for_fused = lambda *_, **__: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        adam._device_dtype_check_for_fused = before  # type: ignore[attr-defined]
