"""A name such as `rtx4090`, an amount such as `24GiB`, or this machine → the device that a run is planned for."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch

from lora_sft.errors import SettingError
from lora_sft.kernels.standing import StandIn
from lora_sft.training.recompute import SHARE_TO_USE

GIB = 2**30

CONTEXT_BYTES = GIB // 2
"""What CUDA itself keeps on a GPU beside PyTorch's memory: context, kernels, the libraries' own."""


@dataclass(frozen=True)
class Device:
    """What is planned for.

    Attributes:
        name: as it is said.
        kind: `cpu` or `cuda`.
        bytes: of memory that a run may use, the CUDA context included.
        flops: floating-point operations a second in matrix products, by dtype: as published, or as measured here.
        bandwidth: bytes a second from its memory.
        capability: of a GPU.
        is_here: whether it is a device of this machine.
    """

    name: str
    kind: str
    bytes: int
    flops: Mapping[torch.dtype, float]
    bandwidth: float
    capability: tuple[int, int] = (8, 0)
    is_here: bool = False

    @property
    def stand_in(self) -> StandIn:
        """What tensors without storage stand for."""
        return StandIn(self.kind, self.capability)

    @property
    def workspace_bytes(self) -> int:
        """cuBLAS's workspaces, which PyTorch takes from its own memory: two, larger from Hopper on.

        Source: `CUDABlas.cpp` (`parseChosenWorkspaceSize`) of PyTorch 2.13; unverified.
        """
        if self.kind != "cuda":
            return 0
        return 2 * (32 if self.capability >= (9, 0) else 8) * 2**20 + (1 << 16)

    @property
    def dtype(self) -> torch.dtype:
        """In which it is trained unless another is asked for."""
        if self.kind == "cpu":
            return torch.float32
        return torch.bfloat16 if self.capability >= (8, 0) else torch.float16


def _gpu(gib: float, tflops: float, gigabytes_a_second: float, capability: tuple[int, int]) -> Device:
    """A card: memory as its driver reports it, dense 16-bit matrix products with sums in float32, bandwidth."""
    in_16_bits = tflops * 1e12
    in_32_bits = in_16_bits / (2 if capability >= (8, 0) else 8)  # TF32, or plain float32 on older ones
    flops = {torch.bfloat16: in_16_bits, torch.float16: in_16_bits, torch.float32: in_32_bits}
    return Device("", "cuda", int(gib * GIB), flops, gigabytes_a_second * 1e9, capability)


CARDS: Mapping[str, Device] = {
    "rtx3060": _gpu(12, 25.6, 360, (8, 6)),
    "rtx3070": _gpu(8, 40.6, 448, (8, 6)),
    "rtx3080": _gpu(10, 59.5, 760, (8, 6)),
    "rtx3090": _gpu(24, 71, 936, (8, 6)),
    "rtx4060": _gpu(8, 30.2, 272, (8, 9)),
    "rtx4060ti": _gpu(16, 44.1, 288, (8, 9)),
    "rtx4070": _gpu(12, 58.3, 504, (8, 9)),
    "rtx4080": _gpu(16, 97.5, 717, (8, 9)),
    "rtx4090": _gpu(24, 165.2, 1008, (8, 9)),
    "rtx5060ti": _gpu(16, 47.4, 448, (12, 0)),
    "rtx5070": _gpu(12, 61.7, 672, (12, 0)),
    "rtx5070ti": _gpu(16, 87.9, 896, (12, 0)),
    "rtx5080": _gpu(16, 112.6, 960, (12, 0)),
    "rtx5090": _gpu(31.8, 209.5, 1792, (12, 0)),
    "t4": _gpu(15, 65, 320, (7, 5)),
    "v100": _gpu(15.8, 125, 900, (7, 0)),
    "a10": _gpu(22.5, 125, 600, (8, 6)),
    "a40": _gpu(45, 149.7, 696, (8, 6)),
    "rtxa6000": _gpu(48, 154.8, 768, (8, 6)),
    "l4": _gpu(22.5, 121, 300, (8, 9)),
    "l40s": _gpu(45, 362, 864, (8, 9)),
    "a100-40": _gpu(39.5, 312, 1555, (8, 0)),
    "a100": _gpu(79.2, 312, 2039, (8, 0)),
    "h100": _gpu(79.6, 989, 3350, (9, 0)),
    "h200": _gpu(140.4, 989, 4800, (9, 0)),
    "b200": _gpu(178, 2250, 8000, (10, 0)),
}
"""Cards by the names that people give them. The numbers are those that their maker publishes."""

AMOUNT = re.compile(r"([\d.]+)\s*(GiB|GB|G|MiB|MB|M)?", re.IGNORECASE)
UNITS = {"gib": GIB, "gb": 10**9, "g": GIB, "mib": 2**20, "mb": 10**6, "m": 2**20}


def find_device(gpu: str | None = None, vram: str | float | None = None) -> Device:
    """The device that is asked for; neither: this machine's.

    Args:
        gpu: a card by name.
        vram: its memory, or that of a card that is not named: `24GiB`, `24GB`, or 24 (GiB).

    Raises:
        SettingError: no such card, or no amount.
    """
    found = this_machine() if gpu is None and vram is None else None
    if found is None and gpu is not None:
        key = re.sub(r"nvidia|geforce|[\s_-]", "", gpu.lower())
        cards = {re.sub("-", "", name): name for name in CARDS}
        name = cards.get(key) or cards.get(f"rtx{key}")
        if name is None:
            raise SettingError(f"gpu: {gpu} is none that is known; use {', '.join(CARDS)}, or vram with its memory")
        found = replace(CARDS[name], name=name)
    if vram is not None:
        amount = read_amount(vram)
        base = found or replace(CARDS["rtx4090"], name="a GPU of that size, as fast as an rtx4090")
        found = replace(base, bytes=amount, name=base.name if gpu else f"{base.name} ({amount / GIB:.0f} GiB)")
    assert found is not None
    return found


def read_amount(text: str | float) -> int:
    """`24GiB`, `24GB`, `24` (GiB) → bytes.

    Raises:
        SettingError: it is none.
    """
    match = AMOUNT.fullmatch(str(text).strip())
    try:
        count = float(match[1]) if match else 0.0
    except ValueError:
        count = 0.0
    if match is None or count <= 0:
        raise SettingError(f"vram: {text} is no amount of memory; write 24GiB, 24GB or 24")
    return int(count * UNITS[(match[2] or "GiB").lower()])


def this_machine(kind: str = "auto", measures: bool = True) -> Device:
    """The first GPU, or the CPU; what is free of its memory, and how fast it is.

    Args:
        kind: `cpu` for the CPU even where there is a GPU.
        measures: whether its speed is measured, in about a second; else all seconds are without meaning.
    """
    if kind != "cpu" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        capability = torch.cuda.get_device_capability()
        kind, name, free = "cuda", torch.cuda.get_device_name(), free + CONTEXT_BYTES  # its context is there already
    else:
        name, capability = f"this computer's CPU, {torch.get_num_threads()} threads", (8, 0)
        kind, free = "cpu", int(psutil.virtual_memory().available * SHARE_TO_USE["cpu"])
    flops, bandwidth = measured_speed(kind) if measures else ({torch.float32: 1.0}, 1.0)
    return Device(name, kind, free, flops, bandwidth, capability, is_here=True)


def measured_speed(kind: str) -> tuple[dict[torch.dtype, float], float]:
    """What a device of this machine does a second: floating-point operations of matrix products, and bytes copied."""
    size = 4096 if kind == "cuda" else 768
    flops = {}
    for dtype in (torch.bfloat16, torch.float32, *([torch.float16] if kind == "cuda" else [])):
        left = torch.ones(size, size, dtype=dtype, device=kind)
        flops[dtype] = 2.0 * size**3 / _seconds(partial(torch.mm, left, left), kind)
    flops.setdefault(torch.float16, flops[torch.bfloat16])
    source = torch.ones(64 << 20, dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    return flops, 2.0 * source.numel() / _seconds(lambda: target.copy_(source), kind)


def _seconds(work: Callable[[], object], kind: str) -> float:
    """The shortest of a few goes."""
    found = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        if kind == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)
