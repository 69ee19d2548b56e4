"""What the machine can do: device, dtype of the arithmetic, peak memory."""

import os
import platform
import sys
from typing import Any

from lora_sft.console import say
from lora_sft.errors import ModelError


def choose_device(wanted: str) -> str:
    """`auto`, `cuda` or `cpu` → `cuda:N` or `cpu`. With several GPUs, each process of a launcher has its own.

    Raises:
        ModelError: CUDA was asked for and is not there.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        built = (
            "this PyTorch was built without CUDA" if torch.version.cuda is None else "no GPU is visible to this process"
        )
        raise ModelError(f"device: cuda is asked for, but {built}; install a CUDA build of PyTorch, or set device: cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        say(
            "device",
            f"cuda:0, the first of {torch.cuda.device_count()} GPUs; `accelerate launch -m lora_sft train …` uses "
            "all of them",
        )
    return f"cuda:{rank}"


def choose_dtype(bf16: bool | None, fp16: bool | None, device: str) -> tuple[str, str]:
    """The dtype of the arithmetic, and why.

    Raises:
        ModelError: the device cannot do what was asked for.
    """
    import torch

    if bf16:
        if device != "cpu" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ModelError("bf16 is asked for, but this GPU has no bfloat16; use fp16, or leave both unset")
        return "bfloat16", "asked for"
    if fp16:
        if device == "cpu":
            raise ModelError("fp16 is asked for, but training in float16 needs a GPU; use bf16, or leave both unset")
        return "float16", "asked for"
    if device == "cpu":
        faster = (
            "; bf16: true is several times as fast on this one" if bf16 is None and _has_bf16_instructions() else ""
        )
        return "float32", f"on the CPU{faster}"
    if bf16 is False or fp16 is False:
        return "float32", "16-bit arithmetic is switched off"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "this GPU supports it"
    return "float16", "this GPU has no bfloat16"


def _has_bf16_instructions() -> bool:
    """Whether this processor multiplies matrices in bfloat16 by itself; torch before 2.10 cannot tell."""
    import torch

    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def peak_bytes(device: str) -> int:
    """The most memory in use so far: allocated on the GPU, or resident in this process."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Memory of the computer that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def device_name(device: str) -> str:
    """The name of the GPU, or of the processor."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    return platform.processor() or platform.machine()
