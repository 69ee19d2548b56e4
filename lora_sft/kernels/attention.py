"""Examples laid end to end in one row → attention that computes each of them alone, and nothing between them."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lora_sft.kernels.standing import capability_of, kind_of
from lora_sft.kernels.swap import Part, Swaps

NAME = "sdpa_by_document"
"""Under this name transformers finds it in its own table, as its documentation of `AttentionInterface` asks for."""

_longest: ContextVar[int | None] = ContextVar("longest document of the row that is computed", default=None)


@contextmanager
def documents(longest: int | None) -> Iterator[None]:
    """Within, a row without padding holds documents of at most so many tokens, whose borders are given to the model.

    Where layers see less than that (a sliding window), the mask is made as ever.
    """
    token = _longest.set(longest)
    try:
        yield
    finally:
        _longest.reset(token)


def attention_by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document; all else is left to transformers' `sdpa`.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head width); key and value may have fewer heads.
        attention_mask: where there is one, it says everything, and this is `sdpa`.
        scaling: of the products; None: one over the root of the head width.
        cu_seq_lens_q: (documents + 1,), where the documents begin and end; int32.
        max_length_q: tokens of the longest.

    Returns:
        (1, tokens, heads, head width), and no attention weights.
    """
    extras = [kwargs.get(name) for name in ("position_bias", "softcap", "s_aux", "cache")]
    alone = cu_seq_lens_q is None or attention_mask is not None or len(query) != 1 or query.shape[2] != key.shape[2]
    if alone or any(extra is not None for extra in extras) or kwargs.get("is_causal") is False:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    assert cu_seq_lens_q is not None
    if _has_varlen(query, dropout):
        longest = query.shape[2] if max_length_q is None else max_length_q
        return _in_one_kernel(query, key, value, cu_seq_lens_q, longest, scaling), None
    return _one_after_another(query, key, value, cu_seq_lens_q.diff().tolist(), dropout, scaling), None


def _in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scaling: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    found = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(found, Tensor)  # a tuple only where more is asked for
    return found[None]


def _one_after_another(
    query: Tensor, key: Tensor, value: Tensor, sizes: list[int], dropout: float, scaling: float | None
) -> Tensor:
    has_groups = query.shape[1] != key.shape[1]
    found, start = [], 0
    for size in sizes:
        here = slice(start, start + size)
        alone = scaled_dot_product_attention(
            query[:, :, here],
            key[:, :, here],
            value[:, :, here],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=has_groups,
        )
        found.append(alone.transpose(1, 2))
        start += size
    return torch.cat(found, dim=1)


def _has_varlen(query: Tensor, dropout: float) -> bool:
    """Whether torch's own kernel for rows of many lengths can be used: on CUDA, in 16 bits, without dropout."""
    return (
        kind_of(query.device) == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and not dropout
        and capability_of(query.device) >= (8, 0)
        and importlib.util.find_spec("torch.nn.attention.varlen") is not None  # torch 2.10
    )


def mask_by_document(
    *args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """None where `attention_by_document` needs no mask; else the mask of `sdpa`."""
    longest = _longest.get()
    if longest is not None and attention_mask is None and (local_size is None or local_size >= longest):
        return None
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)
    return mask


def swap_attention(model: Any, swaps: Swaps) -> Part:
    """Lets a model that computes its attention with `sdpa` do it by document.

    Whether it then keeps documents apart is not known here: it depends on what else the model is made of, and is for
    `isolation.settle` to prove.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name, base = "attention by document", model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    if before != "sdpa":
        return Part(name, 0, f"this model computes its attention with {before}")
    AttentionInterface.register(NAME, attention_by_document)
    AttentionMaskInterface.register(NAME, mask_by_document)
    base.set_attn_implementation(NAME)
    if base.config._attn_implementation != NAME:
        return Part(name, 0, "this model does not let its attention be set")
    swaps.also(lambda: base.set_attn_implementation(before))
    return Part(name, 1)


def takes_documents(model: Any) -> bool:
    """Whether a model's attention is by document now."""
    return bool(getattr(model.config, "_attn_implementation", None) == NAME)
