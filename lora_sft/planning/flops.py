"""An operation with its arguments → how many floating-point operations its matrix products take."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes  # noqa: F401 - its operations are looked up below
import torch
from torch.utils.flop_counter import flop_registry

_aten, _bnb = torch.ops.aten, torch.ops.bitsandbytes


def flops_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> int:
    """0 for an operation without matrix products. A multiplication and an addition are two."""
    packet = func._overloadpacket
    if packet in OURS:
        return int(OURS[packet](args))
    known = flop_registry.get(packet)
    return 0 if known is None else int(known(*args, **kwargs, out_val=found))


def _attention(args: tuple[Any, ...]) -> int:
    """Two products of all queries with all keys; a causal mask is not counted, as in torch's own counts."""
    query, key = args[:2]
    return 4 * int(query.numel()) * int(key.shape[-2])


def _attention_backward(args: tuple[Any, ...]) -> int:
    """Five products where there were two."""
    return 5 * _attention(args[1:]) // 2


def _varlen(args: tuple[Any, ...]) -> int:
    """(tokens, heads, width), at most so many keys for each."""
    return 4 * int(args[0].numel()) * int(args[6])


def _varlen_backward(args: tuple[Any, ...]) -> int:
    return 5 * 4 * int(args[1].numel()) * int(args[9]) // 2


def _of_4_bits(args: tuple[Any, ...]) -> int:
    return 2 * int(args[0].numel()) * int(args[2][0])


def _of_8_bits(args: tuple[Any, ...]) -> int:
    rows, weight = args[1], args[2]
    return 2 * int(rows.numel()) * len(weight)


OURS: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _bnb.gemm_4bit: _of_4_bits,
    _bnb.int8_mixed_scaled_mm: _of_8_bits,
}
"""What torch's `flop_registry` does not know."""

if importlib.util.find_spec("torch.nn.attention.varlen") is not None:  # torch 2.10
    importlib.import_module("torch.nn.attention.varlen")  # registers them
    OURS[torch.ops.torch_attn._varlen_attn] = _varlen
    OURS[torch.ops.torch_attn._varlen_attn_backward] = _varlen_backward
