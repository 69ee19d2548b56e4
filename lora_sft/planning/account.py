"""A simulated step → its peak, what that is made of, and the operation at which it is reached."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lora_sft.planning.allocator import reserved_bytes, rounded
from lora_sft.planning.devices import CONTEXT_BYTES, Device
from lora_sft.planning.simulation import Simulation

PARTS = (
    *("weights", "quantization state", "adapter", "gradients", "optimizer", "batch", "activations", "loss"),
    *("backward", "workspaces", "rounding"),
)
"""What memory is told as, in the order of the step."""


@dataclass(frozen=True)
class Peak:
    """The most memory that a step needs.

    Attributes:
        allocated: bytes that tensors hold, as the device's allocator counts them.
        reserved: bytes that the allocator takes from the device for them; on the CPU the same.
        needed: of the whole device: reserved, and on a GPU the context of CUDA.
        parts: what `allocated` is made of: {part: bytes}.
        operation: that asked for the block with which the peak is reached, and the phase of the step.
    """

    allocated: int
    reserved: int
    needed: int
    parts: Mapping[str, int]
    operation: str


def peak_of(found: Simulation, device: Device) -> Peak:
    """The peak of a simulation, with what the device's allocator adds."""
    on_gpu = device.kind == "cuda"
    sizes = [rounded(block.bytes) if on_gpu else block.bytes for block in found.blocks]
    held = most = place = 0
    for number, event in enumerate(found.events):
        held += sizes[event] if event >= 0 else -sizes[~event]
        if held > most:
            most, place = held, number
    parts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for event in found.events[: place + 1]:
        sign, number = (1, event) if event >= 0 else (-1, ~event)
        parts[_part(found, number)] += sign * found.blocks[number].bytes
        parts["rounding"] += sign * (sizes[number] - found.blocks[number].bytes)
    parts["workspaces"] += device.workspace_bytes
    allocated = most + device.workspace_bytes
    reserved = reserved_bytes((block.bytes for block in found.blocks), found.events) if on_gpu else most
    reserved = max(reserved, most) + device.workspace_bytes
    last = found.blocks[found.events[place]]
    return Peak(
        allocated,
        reserved,
        reserved + (CONTEXT_BYTES if on_gpu else 0),
        {part: count for part, count in parts.items() if count},
        f"{last.operation.removeprefix('aten.').partition('.')[0]} ({last.phase})",
    )


def _part(found: Simulation, number: int) -> str:
    block = found.blocks[number]
    in_words = {"forward": "activations", "workspace": "workspaces", "begin": "optimizer", "model": "weights"}
    return found.parts.get(number) or in_words.get(block.phase, block.phase)
