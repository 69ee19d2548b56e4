"""A device → what can be done about it when it is out of memory."""

import gc

import torch


def can_be_caught(device: torch.device) -> bool:
    """Whether being out of memory is an error there, after which a process goes on.

    On a GPU it is. On the CPU the system promises more than it has, and ends the process when it is used.
    """
    return device.type == "cuda"


def let_go(device: torch.device) -> None:
    """Gives back what a failed pass has left; to be called where its error is gone, which holds all that was computed.

    A larger piece than any that was freed is found only when the allocator has given the pieces back to the GPU.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
