"""The width of a row → how many rows are worked on at a time, so that what is made of them stays in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_sft.kernels.standing import kind_of

BLOCK_ELEMENTS = 1 << 17
"""Of one thread; half a megabyte in float32, which is half of a usual second-level cache."""


def rows_at_a_time(width: int, device: torch.device) -> int:
    """Rows of that width in a block on the CPU; on other devices, where a call costs more than memory, all of them."""
    if kind_of(device) != "cpu":
        return 1 << 62
    return max(1, BLOCK_ELEMENTS * torch.get_num_threads() // width)


def blocks_of(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of all tensors (…, width), in blocks that stay in the cache."""
    step = rows_at_a_time(first.shape[-1], first.device)
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (first, *others)]
    return zip(*(torch.split(tensor, step) for tensor in rows), strict=True)
