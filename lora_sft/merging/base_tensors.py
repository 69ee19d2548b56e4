"""A base's tensors as its files have them → as training saw them, row by row: through 4 bits, rounded, or as stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_sft.merging.placement import Place
from lora_sft.merging.quantized import Quantization
from lora_sft.merging.tensor_file import StoredTensor
from lora_sft.model.base import BaseSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BaseTensors:
    """The base's tensors, as its files have them and as training saw them.

    Attributes:
        stored, places: {name in the files: where it lies; where it lies in the model}.
        skeleton: builds the model without storage, for what only it can tell.
        quantized: modules whose weights went through `how`.
        is_original: they are wanted as they were published, not as training saw them.
        untied: embeddings and head, one matrix in the base, are two here.
    """

    stored: Mapping[str, StoredTensor]
    places: Mapping[str, Place]
    skeleton: "Callable[[], PreTrainedModel]"
    spec: BaseSpec
    how: Quantization | None
    quantized: set[str]
    is_original: bool = False
    untied: bool = False

    def is_quantized(self, name: str) -> bool:
        """Whether training saw this tensor through its quantization."""
        place = self.places.get(name)
        return place is not None and place.parameter.removesuffix(".weight") in self.quantized

    def is_as_stored(self, name: str) -> bool:
        """Whether training saw this tensor's very numbers: it was neither quantized nor rounded."""
        stored, seen = self.stored[name].dtype, getattr(torch, self.spec.dtype)
        if self.is_original or not stored.is_floating_point or name not in self.places:
            return True
        rounded = stored.itemsize > seen.itemsize or {stored, seen} == {torch.float16, torch.bfloat16}
        if self.how is not None and self.is_quantized(name):
            return False
        return not rounded or self.stays_float32(name)

    def stays_float32(self, name: str) -> bool:
        """Whether transformers keeps this tensor in float32, whatever the others are."""
        place = self.places.get(name)
        plain = self.skeleton()
        kept = [*(plain._keep_in_fp32_modules_strict or ())]
        if self.spec.dtype == "float16":
            kept += plain._keep_in_fp32_modules or ()
        return place is not None and any(f".{one}." in f".{place.parameter}." for one in kept)

    def rows(self, name: str) -> Callable[[int, int], Tensor]:
        """A reader of rows as training saw them, in float32."""
        tensor = self.stored[name]
        if self.how is not None and self.is_quantized(name):
            if self.is_turned(name):
                return _turned_rows(tensor, self.how)
            restored = self.how.restored(tensor.read, tensor.rows, tensor.columns)
            return lambda start, stop: restored(start, stop).float()
        if self.is_original or self.is_as_stored(name):
            return lambda start, stop: tensor.read(start, stop).float()
        seen = torch.float32 if self.stays_float32(name) else getattr(torch, self.spec.dtype)
        return lambda start, stop: tensor.read(start, stop).to(seen).float()

    def is_turned(self, name: str) -> bool:
        """Whether bitsandbytes turned the weight round before it quantized it: those of GPT-2."""
        from transformers.pytorch_utils import Conv1D

        return isinstance(self.skeleton().get_submodule(self.places[name].parameter.removesuffix(".weight")), Conv1D)


def _turned_rows(tensor: StoredTensor, how: Quantization) -> Callable[[int, int], Tensor]:
    """As `rows`, of a weight that was quantized the other way round; it is held whole."""
    turned = tensor.read().T.contiguous()
    restored = how.restored(lambda start, stop: turned[start:stop], *turned.shape)
    whole = restored(0, len(turned)).float().T.contiguous()
    return lambda start, stop: whole[start:stop].clone()
