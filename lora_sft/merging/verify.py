"""A written model and the adapter it came from → the proof that they are the same.

With enough memory the adapter is loaded on its own base by transformers, bitsandbytes and PEFT: every written tensor is
held against what they compute, and then the next-token distributions of both models. A model that is too large to load
is checked tensor by tensor against its files.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from lora_sft.console import say
from lora_sft.errors import ModelError, SettingError, VerificationError
from lora_sft.merging.base_files import weight_tensors
from lora_sft.merging.fidelity import Fidelity, compare, logits_of, probes_of
from lora_sft.merging.file_check import check_files
from lora_sft.merging.live_check import check_live
from lora_sft.merging.merged import MergedModel
from lora_sft.merging.weight_check import ROUNDING, WeightCheck
from lora_sft.model.base import BaseSpec, load_base
from lora_sft.model.loading import load_adapters, tokenizer_of

WAYS = ("auto", "logits", "tensors", "no")
PIECE = 2**21


@dataclass(frozen=True)
class Reference:
    """The adapter on its base, read off before it is freed.

    Attributes:
        probes: token ids of the probes, (1, length) each.
        adapter, base: logits of each, with and without the adapter.
        dtype: of its arithmetic.
    """

    probes: list[Tensor]
    adapter: list[Tensor]
    base: list[Tensor]
    dtype: str

    def compare(self, folder: Path, trust_remote_code: bool = False, quantization: str | None = None) -> Fidelity:
        """A written model, loaded on the CPU, against it. In float32, if there is room for that."""
        spec = BaseSpec(str(folder), quantization=quantization, trust_remote_code=trust_remote_code)
        if quantization is None and free_bytes() < 2 * _stored_bytes(folder):
            spec = replace(spec, dtype="bfloat16")
        return compare(logits_of(load_base(spec).eval(), self.probes), self.adapter, self.base)


@dataclass(frozen=True)
class Verified:
    """What was found; either may not have been looked at."""

    fidelity: Fidelity | None
    weights: WeightCheck | None
    dtype: str

    @property
    def holds(self) -> bool:
        """Whether the result is the adapter."""
        return (self.fidelity is None or self.fidelity.holds(self.dtype)) and not (
            self.weights and self.weights.failing
        )

    def refuse(self) -> None:
        """Raises VerificationError if it is not."""
        if not self.holds:
            raise VerificationError(f"the merged model is not the adapter: {self}")

    def summary(self) -> dict[str, Any]:
        """For `--json` and the card."""
        found: dict[str, Any] = {"how": "logits" if self.fidelity else "tensors" if self.weights else "not"}
        if self.fidelity:
            found |= asdict(self.fidelity) | {"share_lost": self.fidelity.share_lost}
        if self.weights:
            found["weights"] = self.weights.summary()
        return found | {"holds": self.holds}

    def __str__(self) -> str:
        said = [str(one) for one in (self.fidelity, self.weights) if one is not None]
        return "; ".join([*said, "it holds" if self.holds else "it does not hold"] if said else ["not compared"])


def choose_way(wanted: str, merged: MergedModel, device: str) -> str:
    """`auto` → `logits` if the models can be loaded one after the other, else `tensors`.

    Raises:
        SettingError: what was asked for is unknown, or cannot be had.
    """
    if wanted not in WAYS:
        raise SettingError(f"verify {wanted!r} is not one of {', '.join(WAYS)}")
    if merged.blend.is_dense:
        if wanted == "logits":
            raise SettingError("a merge by ties or dare has no adapter that it could be compared with; verify: tensors")
        return "no" if wanted == "no" else "tensors"
    if wanted != "auto":
        return wanted
    needed = _needed_bytes(merged)
    free = free_bytes() if device == "cpu" else min(torch.cuda.mem_get_info(device)[0], free_bytes())
    if needed > free:
        say("verify", f"tensor by tensor (loading the models takes {_gib(needed)}, {_gib(free)} are free)")
        return "tensors"
    return "logits"


def verify(merged: MergedModel, folder: Path, way: str, reference: Reference | None) -> Verified:
    """A written model → how it compares with its adapter.

    Args:
        way: logits, tensors or no.
        reference: with logits; its tensors were checked when it was made.
    """
    dtype = _coarser(merged, folder)
    if way == "no":
        return Verified(None, None, dtype)
    if way == "tensors" or reference is None:
        return Verified(None, check_files(merged, folder), dtype)
    fidelity = reference.compare(folder, merged.spec.trust_remote_code)
    return Verified(fidelity, None, _coarser(merged, folder, reference.dtype))


def refer(merged: MergedModel, spec: BaseSpec, folder: Path | None = None) -> tuple[Reference, WeightCheck | None]:
    """Loads the adapter on its base, reads off its distributions, and holds a written model's tensors against it.

    Args:
        spec: how the base is loaded.
        folder: of the written model; None reads the distributions alone.
    """
    model = load_adapters(merged.adapters, spec, merged.blend.weights, merged.vocabulary_size or 0)
    probes = _probes(merged, spec)
    with_adapter = logits_of(model, probes)
    with model.disable_adapter():
        without = logits_of(model, probes)
    reference = Reference(probes, with_adapter, without, spec.dtype)
    if folder is None or len(merged.adapters) > 1:  # PEFT's layers know one adapter's update at a time
        return reference, None if folder is None else check_files(merged, folder)
    # Where this device cannot compute in the dtype of the training, the 4-bit weights are restored in float32.
    slack = 0.0 if spec.dtype == merged.spec.dtype else ROUNDING[getattr(torch, merged.spec.dtype)]
    return reference, check_live(model, merged, folder, slack)


def _probes(merged: MergedModel, spec: BaseSpec) -> list[Tensor]:
    """Token ids to compare distributions on: conversations, or random ones where there is no tokenizer."""
    try:
        probes = probes_of(tokenizer_of(Path(merged.adapters[0]), spec))
    except ModelError:
        probes = []
    if probes and all(probe.numel() for probe in probes):  # for some families transformers makes up an empty tokenizer
        return probes
    vocabulary = merged.base.skeleton().get_input_embeddings().num_embeddings
    say("probes", "random tokens (neither the adapter nor its base has a tokenizer)")
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (1, 24), generator=generator) for _ in range(4)]


def _coarser(merged: MergedModel, folder: Path, *others: str) -> str:
    """The coarsest of the dtypes that have to do with it: of the training, of the file, of the arithmetic."""
    order = ["float32", "float16", "bfloat16"]
    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in weight_tensors(folder).values()}
    return max([merged.spec.dtype, *others, *(stored & set(order))], key=order.index)


def free_bytes() -> int:
    """Memory that this machine can still give."""
    return int(psutil.virtual_memory().available)


def _stored_bytes(folder: Path) -> int:
    return sum(tensor.size for tensor in weight_tensors(folder).values())


def _needed_bytes(merged: MergedModel) -> int:
    """For the larger of the two models, loaded one after the other; the merged one in 16 bits at least."""
    numbers = sum(torch.Size(shape).numel() for shape in merged.shapes.values())
    return int(1.3 * numbers * max(2, getattr(torch, merged.spec.dtype).itemsize))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
