"""The work of a simulated step → seconds: an operation takes as long as its arithmetic or its memory does."""

from collections.abc import Iterable
from typing import NamedTuple

from lora_sft.planning.devices import Device
from lora_sft.planning.simulation import Simulation

MICRO_BATCH = ("batch", "forward", "loss", "backward")
"""Phases that every micro-batch goes through; `optimizer` comes once a step."""

SHARES = {"cuda": (0.6, 0.8, 8e-6), "cpu": (0.55, 0.6, 6e-6)}
"""Of the published arithmetic and bandwidth, what well-made kernels reach, and the seconds that starting one takes.
On a CPU both are measured on the spot, on shapes that suit it well; a step reaches that much of them (`bench.plan`)."""

UNSURE = 0.35
"""How far the seconds may be off if no step was measured."""

UNSURE_MEASURED = 0.1
"""The same after ten steps on the device."""


class Pace(NamedTuple):
    """Seconds of a micro-batch, and of the update at the end of a step."""

    micro_batch: float
    update: float


def pace_of(found: Simulation, device: Device) -> Pace:
    """How long a device takes for a simulated step, by its roofline.

    Source: Williams, Waterman, Patterson, Roofline (2009).
    """
    return Pace(_seconds(found, MICRO_BATCH, device), _seconds(found, ("optimizer",), device))


def _seconds(found: Simulation, phases: Iterable[str], device: Device) -> float:
    arithmetic, memory, start = SHARES[device.kind]
    slowest = min(device.flops.values())
    return sum(
        count
        * (
            start
            + max(
                work.flops / (arithmetic * device.flops.get(work.dtype, slowest)),
                work.bytes / (memory * device.bandwidth),
            )
        )
        for phase in phases
        for work, count in found.work[phase].items()
    )
