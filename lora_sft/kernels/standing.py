"""A device → the one that it stands for: a step that is only planned runs on tensors without storage."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch


class StandIn(NamedTuple):
    """What the `meta` device stands for.

    Attributes:
        kind: `cpu` or `cuda`.
        capability: of a GPU, as CUDA counts them; (8, 9) is Ada.
    """

    kind: str = "cpu"
    capability: tuple[int, int] = (8, 0)


_planned: ContextVar[StandIn | None] = ContextVar("what tensors without storage stand for", default=None)


@contextmanager
def standing_for(device: StandIn) -> Iterator[None]:
    """Within, tensors without storage take the ways that tensors of this device would."""
    token = _planned.set(device)
    try:
        yield
    finally:
        _planned.reset(token)


def _stand_in() -> StandIn:
    return _planned.get() or StandIn()


def kind_of(device: torch.device) -> str:
    """`cpu`, `cuda`, …: whose ways a tensor of this device goes."""
    return _stand_in().kind if device.type == "meta" else device.type


def capability_of(device: torch.device) -> tuple[int, int]:
    """Of a GPU."""
    return _stand_in().capability if device.type == "meta" else torch.cuda.get_device_capability(device)


def autocast_of(device: torch.device) -> str:
    """Under which name torch keeps the autocast for it. There is none for tensors without storage: theirs is the CPU's,
    which `planning` reads."""
    return "cpu" if device.type == "meta" else device.type


def with_numbers(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it holds no numbers to try something with."""
    return torch.device("cpu") if device.type == "meta" else device
