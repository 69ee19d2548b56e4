"""A device → the ways that torch takes on it, for tensors without storage: attention, dropout, autocast.

torch chooses them above the place where a `Simulation` looks on, by the device; for `meta` it would choose others.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lora_sft.kernels.standing import StandIn

_aten = torch.ops.aten

IN_16_BITS = frozenset(
    (
        *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention),
        *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.addbmm, torch.einsum),
        *(
            Tensor.matmul,
            Tensor.__matmul__,
            Tensor.__rmatmul__,
            Tensor.mm,
            Tensor.bmm,
            Tensor.addmm,
            Tensor.baddbmm,
            Tensor.mv,
        ),
    )
)
"""What autocast computes in its dtype, of what models of language are made of."""

IN_32_BITS_ON_CUDA = frozenset(
    (
        *(F.layer_norm, F.group_norm, F.softplus, torch.pow, torch.rsqrt, torch.exp, torch.log, torch.cumsum),
        *(torch.prod, torch.norm, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.exp, Tensor.log, Tensor.sum),
        *(torch.sum, Tensor.cumsum, Tensor.prod, Tensor.norm),
    )
)
"""What it computes in float32 there; softmax goes by the dtype that models give it."""


class Ways(TorchFunctionMode):
    """Within it, calls of torch take the ways of a device."""

    def __init__(self, device: StandIn) -> None:
        super().__init__()
        self.device = device
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}

    def forget_casts(self) -> None:
        """At the end of a forward pass autocast lets go of the weights that it has cast."""
        self._cast.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """A call of torch, with its arguments cast as autocast does."""
        kwargs = dict(kwargs or {})
        if func is Tensor.__getitem__ and args[0].is_meta:
            args = (args[0], _with_values_of_lists(args[1]))
        if torch.is_autocast_enabled("cpu") and _any_meta(args, kwargs):
            if func in IN_16_BITS and not _is_position(args):
                dtype = torch.get_autocast_dtype("cpu")
                args, kwargs = self._in(dtype, args), {name: self._in(dtype, one) for name, one in kwargs.items()}
            elif self.device.kind == "cuda" and func in IN_32_BITS_ON_CUDA:
                args = self._in(torch.float32, args)
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return attention(self.device, *args, **kwargs)
        if func is F.dropout and self.device.kind == "cuda" and args[0].is_meta:
            return _dropout_on_cuda(*args, **kwargs)
        return func(*args, **kwargs)

    def _in(self, dtype: torch.dtype, given: Any) -> Any:
        if isinstance(given, (list, tuple)):
            return type(given)(self._in(dtype, one) for one in given)
        if not isinstance(given, Tensor) or not given.dtype.is_floating_point or given.dtype == dtype:
            return given
        if not (given.is_leaf and given.requires_grad and given.dtype == torch.float32):
            return given.to(dtype)
        if id(given) not in self._cast:  # trained weights are cast once in a forward pass
            self._cast[id(given)] = given, given.to(dtype)
        return self._cast[id(given)][1]


@contextmanager
def autocast_without_storage() -> Iterator[None]:
    """Within, whoever enters an autocast for the device of a tensor without storage enters that of the CPU, which
    `Ways` reads: torch 2.13 has none for it, and refuses even to switch one off."""
    before = torch.autocast.__init__

    def begin(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        before(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast.__init__ = begin  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = before  # type: ignore[method-assign]


def _any_meta(args: Any, kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(one, Tensor) and one.is_meta for one in (*args, *kwargs.values()))


def _with_values_of_lists(index: Any) -> Any:
    """Lists of places as tensors that keep their values: torch would make tensors of them where nobody looks on."""
    if isinstance(index, tuple):
        return tuple(map(_with_values_of_lists, index))
    return torch.tensor(index).to("meta") if isinstance(index, list) else index


def _is_position(args: tuple[Any, ...]) -> bool:
    """Products of float32 numbers that nobody learns: angles of rotary positions, which models keep out of autocast."""
    floats = [one for one in args if isinstance(one, Tensor) and one.dtype.is_floating_point]
    return all(one.dtype == torch.float32 and not one.requires_grad for one in floats)


def attention(
    device: StandIn,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by the kernel that torch chooses on a device.

    Source: `sdp_utils.cpp` and `sdp_utils_cpp.cpp` of PyTorch 2.13.
    """
    in_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, query.new_zeros(()), query.new_full((), float("-inf")))
    if device.kind == "cpu":
        if not dropout_p and query.shape[-1] == value.shape[-1]:
            return _aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
                query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
    elif attn_mask is None and in_16_bits and device.capability >= (8, 0) and query.shape[-1] <= 256:
        return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
    elif query.shape[1] == key.shape[1]:
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        return _aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
            query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]
    return _aten._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _dropout_on_cuda(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and 0 < p < 1 else input
