"""Weights as they are stored → what a quantized base made of them in training, row by row.

bitsandbytes quantizes blocks of a weight, so that rows can be restored without the rest. Only double quantization
looks at the whole: it rounds the blocks' scales, after taking their mean off; so the scales are gathered first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_sft.model.base import BaseSpec

ReadRows = Callable[[int, int], Tensor]

NESTED_BLOCKSIZE = 256
"""Of the scales, with double quantization; bitsandbytes leaves no choice."""
PIECE = 2**21
"""Weights that are looked at together."""


@dataclass(frozen=True)
class Quantization:
    """How the quantized weights of a base were made.

    Attributes:
        kind: nf4, fp4 or int8.
        double: whether the scales are quantized too.
        dtype: that the weights had before, and have when they are restored.
        blocksize: weights that share a scale; of 4 bits.
    """

    kind: str
    double: bool
    dtype: torch.dtype
    blocksize: int = 64

    @classmethod
    def of(cls, spec: BaseSpec, blocksize: int = 64) -> "Quantization | None":
        """That of a base; None if it was not quantized."""
        if spec.quantization is None:
            return None
        return cls(spec.quantization, spec.double_quant, getattr(torch, spec.dtype), blocksize)

    def restored(self, read: ReadRows, rows: int, columns: int) -> ReadRows:
        """A reader of stored rows → a reader of the rows that training saw: of `dtype`, those of int8 in float32."""
        if self.kind == "int8":
            return lambda start, stop: _through_int8(read(start, stop).to(self.dtype))
        return _FourBit(self, read, rows, columns).rows


def _through_int8(rows: Tensor) -> Tensor:
    """Each row is rounded to 255 steps of its largest weight, in float16 as `Int8Params` does."""
    from bitsandbytes import functional

    whole, scale, _ = functional.int8_vectorwise_quant(rows.to(torch.float16))
    return torch.as_tensor(functional.int8_vectorwise_dequant(whole, scale))


class _FourBit:
    """One weight, rounded to 4 bits and back."""

    def __init__(self, how: Quantization, read: ReadRows, rows: int, columns: int) -> None:
        self._how, self._read, self._rows, self._columns = how, read, rows, columns
        self._together = how.blocksize // math.gcd(columns, how.blocksize)  # rows that end with a block
        self._scales = self._rounded_scales() if how.double else None

    def _rounded_scales(self) -> Tensor:
        """The scale of every block after double quantization."""
        from bitsandbytes import functional

        step = max(PIECE // self._columns // self._together, 1) * self._together
        found = []
        for start in range(0, self._rows, step):
            flat = self._read(start, min(start + step, self._rows)).to(self._how.dtype).float().abs().flatten()
            flat = torch.nn.functional.pad(flat, (0, -len(flat) % self._how.blocksize))
            found.append(flat.view(-1, self._how.blocksize).amax(1))
        scales = torch.cat(found)
        mean = scales.mean()
        rounded, state = functional.quantize_blockwise(scales - mean, blocksize=NESTED_BLOCKSIZE)
        return torch.as_tensor(functional.dequantize_blockwise(rounded, state) + mean)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows as training saw them."""
        from bitsandbytes import functional

        first = start - start % self._together
        last = min(stop + -stop % self._together, self._rows)
        weights = self._read(first, last).to(self._how.dtype)
        packed, state = functional.quantize_4bit(
            weights.flatten(), blocksize=self._how.blocksize, quant_type=self._how.kind
        )
        if self._scales is not None:
            block = first * self._columns // self._how.blocksize
            state.absmax = self._scales[block : block + len(state.absmax)]
        whole: Tensor = functional.dequantize_4bit(packed, state).reshape(weights.shape)
        return whole[start - first : stop - first]
