"""The width of a row → how many rows are worked on at a time, so that what is made of them stays in the cache."""

import torch

BLOCK_ELEMENTS = 1 << 17
"""Of one thread; half a megabyte in float32, which is half of a usual second-level cache."""


def rows_at_a_time(width: int, device: torch.device) -> int:
    """Rows of that width in a block on the CPU; on other devices, where a call costs more than memory, all of them."""
    if device.type != "cpu":
        return 1 << 62
    return max(1, BLOCK_ELEMENTS * torch.get_num_threads() // width)
