"""Inputs of layers → the memory of the host until the backward pass needs them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class Away:
    """A layer's input that was sent to the host.

    Attributes:
        copy: of it, on the host.
        device: from which it came.
        previous: of the layer before, which the backward pass needs next.
        arriving: on its way back to the device, and the event of its arrival.
    """

    copy: Tensor
    device: torch.device
    previous: "Away | None"
    arriving: tuple[Tensor, Any] | None = None


@dataclass
class HostCopies:
    """Inputs of layers, copied to the host while the layer computes, and back one layer ahead of the backward pass.

    Copies go through pinned memory on a stream of their own. A tensor on the CPU is copied at once, which is of no use
    but to try it.
    """

    _latest: Away | None = None
    _streams: dict[torch.device, Any] = field(default_factory=dict)

    def keeping(self, number: int) -> Callable[[], AbstractContextManager[Any]]:
        """What is saved within the context is kept on the host; layer 0 begins a forward pass."""

        def pack(tensor: Tensor) -> Away:
            away = self._send(tensor, None if number == 0 else self._latest)
            self._latest = away
            return away

        return lambda: saved_tensors_hooks(pack, self._fetch)

    def _send(self, tensor: Tensor, previous: Away | None) -> Away:
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
        if tensor.is_cuda:
            stream = self._stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                copy.copy_(tensor.detach(), non_blocking=True)
            tensor.record_stream(stream)  # its memory is not given to others before the copy is made
        else:
            copy.copy_(tensor.detach())
        return Away(copy, tensor.device, previous)

    def _fetch(self, away: Away) -> Tensor:
        self._latest = None
        tensor, arrived = self._bring(away)
        away.arriving = None
        if arrived is not None:
            now = torch.cuda.current_stream(away.device)
            now.wait_event(arrived)
            tensor.record_stream(now)
        if away.previous is not None:
            self._bring(away.previous)
        return tensor

    def _bring(self, away: Away) -> tuple[Tensor, Any]:
        """Starts the way back, unless it has begun."""
        if away.arriving is None:
            if away.device.type == "cuda":
                stream = self._stream(away.device)
                with torch.cuda.stream(stream):
                    away.arriving = away.copy.to(away.device, non_blocking=True), stream.record_event()
            else:
                away.arriving = away.copy.clone(), None
        return away.arriving

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]
