"""The element-wise parts of a training step: ours beside the model's own, torch's and the compiled plain formula.

`python -m bench.kernels [ROUNDS]` computes values and gradients of each part in turn, round by round, on one thread. It
prints medians of CPU milliseconds, their ratio to the model's own, and what autograd holds beside the part's output.
Memory that was freed is used again (two settings of the C library), because the cost of fresh pages depends on what ran
before. Compiling comes first and is told apart; its time is the wall clock's, since another process compiles.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

TOKENS = 1500
SHAPES = {"width 512, intermediate 1408": (512, 1408), "width 1024, intermediate 2816": (1024, 2816)}
REUSE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "OMP_NUM_THREADS": "1"}


def sides(width: int, intermediate: int, dtype: Any) -> dict[str, tuple[list[Any], dict[str, Callable[..., Any]]]]:
    """A part → its inputs, and who computes it; the model's own first."""
    import torch
    from torch.nn import functional as F
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from lora_sft.kernels.gated import GELU_TANH, SILU, gated_product
    from lora_sft.kernels.norm import KINDS, rms_norm

    torch.manual_seed(0)
    llama, gemma = (sort(width).to(dtype).requires_grad_(False) for sort in (LlamaRMSNorm, GemmaRMSNorm))
    x = torch.randn(1, TOKENS, width).to(dtype)
    gate, up = torch.randn(2, 1, TOKENS, intermediate).to(dtype)

    def swiglu(gate: Any, up: Any) -> Any:
        return F.silu(gate) * up

    def geglu(gate: Any, up: Any) -> Any:
        return F.gelu(gate, approximate="tanh") * up

    def swiglu_of_one(both: Any) -> Any:
        gate, up = both.chunk(2, dim=-1)
        return up * F.silu(gate)

    return {
        "RMSNorm (Llama)": (
            [x],
            {
                "own": llama,
                "ours": lambda x: rms_norm(x, llama.weight, llama.variance_epsilon),
                "torch": lambda x: F.rms_norm(x, (width,), llama.weight, llama.variance_epsilon),
                "compiled": torch.compile(lambda x: type(llama).forward(llama, x), dynamic=True),
            },
        ),
        "RMSNorm (Gemma)": (
            [x],
            {"own": gemma, "ours": lambda x: rms_norm(x, gemma.weight, gemma.eps, KINDS[2])},
        ),
        "SwiGLU": (
            [gate, up],
            {
                "own": swiglu,
                "ours": lambda *parts: gated_product(SILU, *parts),
                "compiled": torch.compile(swiglu, dynamic=True),
            },
        ),
        "SwiGLU (one projection)": (
            [torch.cat([gate, up], -1)],
            {"own": swiglu_of_one, "ours": lambda both: gated_product(SILU, both)},
        ),
        "GeGLU": (
            [gate, up],
            {
                "own": geglu,
                "ours": lambda *parts: gated_product(GELU_TANH, *parts),
                "compiled": torch.compile(geglu, dynamic=True),
            },
        ),
    }


def once(function: Callable[..., Any], inputs: list[Any]) -> Callable[[], None]:
    """Values and gradients, as a call without arguments."""
    import torch

    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    towards = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, towards) and None


def held_bytes(function: Callable[..., Any], inputs: list[Any]) -> int:
    """What autograd holds until the gradients, beside the output and the weights."""
    import torch

    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    kept = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        found = function(*leaves)
    kept.pop(found.untyped_storage().data_ptr(), None)
    return sum(count for count in kept.values() if count > 8 * inputs[0].shape[-1])


def measure(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """CPU milliseconds of each, medians."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            clock = time.thread_time()
            call()
            taken[name].append(1e3 * (time.thread_time() - clock))
    return {name: statistics.median(times) for name, times in taken.items()}


def main(rounds: int = 21) -> None:
    """Prints a line for each part and shape, and the whole as JSON."""
    if any(os.environ.get(name) != value for name, value in REUSE.items()):
        os.execve(sys.executable, [sys.executable, "-m", "bench.kernels", str(rounds)], {**os.environ, **REUSE})
    import torch

    torch.set_num_threads(1)
    found = []
    for shape, (width, intermediate) in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            for part, (inputs, functions) in sides(width, intermediate, dtype).items():
                calls, first = {}, {}
                for name, function in functions.items():
                    clock = time.perf_counter()
                    calls[name] = once(function, inputs)
                    calls[name]()
                    first[name] = time.perf_counter() - clock
                times = measure(calls, rounds)
                held = {name: held_bytes(one, inputs) for name, one in functions.items() if name != "compiled"}
                line = {"part": part, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
                line |= {"milliseconds": times, "held_bytes": held, "first_call_seconds": first.get("compiled")}
                found.append(line)
                print(said(line))
    print(json.dumps(found))


def said(line: dict[str, Any]) -> str:
    """One measurement in words."""
    times, held = line["milliseconds"], line["held_bytes"]
    words = [
        f"{name} {ms:.2f} ms (×{times['own'] / ms:.2f}{f', {held[name] / 1e6:.1f} MB held' if name in held else ''})"
        for name, ms in times.items()
    ]
    compiled = f"; first compiled in {line['first_call_seconds']:.1f} s" if line["first_call_seconds"] else ""
    return f"{line['part']}, {line['shape']}, {line['dtype']}: {', '.join(words)}{compiled}"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
