"""An operation and a device → the bytes that its kernel takes for itself while it runs, which no tensor shows.

Those of the CPU were found by profiling (`tests/planning/test_hidden.py` looks for others); those of CUDA were read in
the sources of PyTorch 2.13 and FlashAttention 2, and are unverified.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import bitsandbytes  # noqa: F401 - its operations are looked up below
import torch
from torch import Tensor

from lora_sft.kernels.standing import StandIn

_aten = torch.ops.aten

IN_16_BITS = (torch.float16, torch.bfloat16)


def hidden_bytes(func: Any, args: tuple[Any, ...], device: StandIn) -> int:
    """What the kernel of an operation takes besides its results; 0 for one that is not listed."""
    known = HIDDEN.get((device.kind, func._overloadpacket))
    return 0 if known is None else known(args)


def _product(args: tuple[Any, ...]) -> int:
    """oneDNN's scratchpad of a product in bfloat16; it depends on the processor's blocking, this is its size on one."""
    left, right = args[-2:]
    if left.dtype != torch.bfloat16:
        return 0
    inner, is_turned = left.shape[-1], left.stride(-1) != 1
    each = min(1_393_792, 512 * inner + 2112) if is_turned else 64 * min(inner, 2048) + 66_560
    return int(min(each, 4 * left.numel() + 4 * right.numel() + 2112)) * torch.get_num_threads()


def _blocks(length: int, keys: int) -> tuple[int, int]:
    """Queries and keys that are looked at together."""
    queries = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(queries, length), min(512, keys)


def _attention(args: tuple[Any, ...]) -> int:
    """Per thread: products, their maxima and sums, and outputs of a block; in 16 bits the products once more.

    Source: `cpu_flash_attention` in `FlashAttentionKernel.cpp`.
    """
    query, key = args[:2]
    queries, keys = _blocks(query.shape[2], key.shape[2])
    each = 4 * queries * (keys + 2 + query.shape[3])
    if query.dtype in IN_16_BITS:
        each += 2 * queries * keys
    return int(each) * torch.get_num_threads()


def _attention_backward(args: tuple[Any, ...]) -> int:
    """Per thread: products and their gradients of a block; in 16 bits both once more, and oneDNN's scratchpad."""
    query, key = args[1:3]
    queries, keys = _blocks(query.shape[2], key.shape[2])
    each = 8 * queries * keys + 4 * queries
    if query.dtype in IN_16_BITS:
        each += 4 * queries * keys + 230_528
    return int(each) * torch.get_num_threads()


def _flash_backward(args: tuple[Any, ...]) -> int:
    """Gradients at queries in float32, the sums of rows, and with grouped keys those at keys and values, ungrouped.

    Source: `mha_bwd` in `flash_api.cpp`.
    """
    return _flash_buffers(args[1].transpose(1, 2), args[2].transpose(1, 2))


def _varlen_backward(args: tuple[Any, ...]) -> int:
    """The same for a row of many lengths: (tokens, heads, width).

    Source: `mha_varlen_bwd` in `flash_api.cpp`.
    """
    return _flash_buffers(args[1][None], args[2][None])


def _flash_buffers(query: Tensor, key: Tensor) -> int:
    batch, length, heads, width = query.shape
    rounded, wide = -(-length // 128) * 128, -(-width // 32) * 32
    found = 4 * batch * heads * rounded * (wide + 1)
    if key.shape[2] != heads:
        found += 2 * key.element_size() * batch * key.shape[1] * heads * width
    return found


def _efficient_backward(args: tuple[Any, ...]) -> int:
    """Gradients in float32 that blocks add to, and the sums of rows."""
    query, key, value = args[1:4]
    found = 4 * int(query.shape[:3].numel())
    if query.dtype in IN_16_BITS:
        found += 4 * (query.numel() + key.numel() + value.numel())
    return found


def _norm(args: tuple[Any, ...]) -> int:
    """A copy in float32, in which the sum is made."""
    return 4 * int(args[0].numel()) if args[0].dtype in IN_16_BITS else 0


def _product_of_4_bits(args: tuple[Any, ...]) -> int:
    """The weight is made whole for it, and its scales in float32.

    Source: `_dequant_linear_fallback` of bitsandbytes 0.50; on CUDA for more than 1,536 rows, on the CPU for all.
    """
    rows, _, shape, _, blocksize = args[:5]
    count = shape[0] * shape[1]
    return int(count * rows.element_size() + 4 * (count // blocksize))


HIDDEN: dict[tuple[str, Any], Callable[[tuple[Any, ...]], int]] = {
    ("cpu", _aten.mm): _product,
    ("cpu", _aten.addmm): _product,
    ("cpu", _aten.addmm_): _product,
    ("cpu", _aten._scaled_dot_product_flash_attention_for_cpu): _attention,
    ("cpu", _aten._scaled_dot_product_flash_attention_for_cpu_backward): _attention_backward,
    ("cpu", _aten.linalg_vector_norm): _norm,
    ("cpu", torch.ops.bitsandbytes.gemm_4bit): _product_of_4_bits,
    ("cuda", torch.ops.bitsandbytes.gemm_4bit): _product_of_4_bits,
    ("cuda", _aten._scaled_dot_product_flash_attention_backward): _flash_backward,
    ("cuda", _aten._scaled_dot_product_efficient_attention_backward): _efficient_backward,
}
"""By kind of device and operation."""

if importlib.util.find_spec("torch.nn.attention.varlen") is not None:  # torch 2.10
    importlib.import_module("torch.nn.attention.varlen")  # registers it
    HIDDEN["cuda", torch.ops.torch_attn._varlen_attn_backward] = _varlen_backward
