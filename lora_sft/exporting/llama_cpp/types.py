"""The name of a GGUF's precision → the type of each of its tensors, and the kernel that rounds to it.

Which tensor of a mixed file gets which type is decided as llama.cpp decides it in its own quantizer, without an
importance matrix; the rounding is done by llama.cpp's kernel.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Precision:
    """How the weights of a GGUF are stored.

    Attributes:
        name: what the user writes.
        file_type: its name in `gguf.LlamaFileType`.
        bits: a weight, on average, rounded up.
        mean_kl: what the rounding costs at most, in nats a position, before the file is taken for broken.
        is_exact: whether replies must be the adapter's own, word for word.
        body: type of most tensors, for those that llama.cpp mixes; None if all tensors are of one type.
        raised: type of the tensors that are given more bits.
    """

    name: str
    file_type: str
    bits: float
    mean_kl: float
    is_exact: bool = False
    body: str | None = None
    raised: str | None = None


# The bounds of those of 32 and 16 bits are what rounding explains: of the weights, and of the numbers that llama.cpp
# multiplies them with, which it rounds alike. The bounds of the quantized ones are ten times what llama.cpp reports for
# Llama 3 8B (tools/perplexity/README.md: 0.0014, 0.0055, 0.011, 0.031), since smaller models lose more. A wrong tensor
# or a lost update is far beyond.
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("f32", "ALL_F32", 32, 1e-5, is_exact=True),
        Precision("f16", "MOSTLY_F16", 16, 1e-4, is_exact=True),
        Precision("bf16", "MOSTLY_BF16", 16, 2e-3),
        Precision("q8_0", "MOSTLY_Q8_0", 8.5, 0.014),
        Precision("q6_k", "MOSTLY_Q6_K", 7, 0.055, body="Q6_K", raised="Q6_K"),
        Precision("q5_k_m", "MOSTLY_Q5_K_M", 6, 0.11, body="Q5_K", raised="Q6_K"),
        Precision("q4_k_m", "MOSTLY_Q4_K_M", 5.2, 0.31, body="Q4_K", raised="Q6_K"),
    )
}

FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What stands in where a row is no multiple of 256 weights: its blocks have 32."""

# The quantizer leaves these as they are; the converter has its own rule for most of them.
NOT_QUANTIZED = (
    *("_norm.weight", "ffn_gate_inp", "ffn_gate_tid2eid", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d"),
    *("shortconv.conv", "indexer.", "time_mix_", "attn_rel_b", "position_embd", "token_types"),
)

OTHER_RULES = ("falcon", "glm5-next")
"""Architectures for which llama.cpp's quantizer has rules of its own that are not kept here."""


@dataclass(frozen=True)
class Shape:
    """What the choice of a tensor's type depends on, beside its name.

    Attributes:
        architecture: llama.cpp's name.
        layers: how many.
        experts: how many a layer has; 0 if none.
        value_layers: the layers that have an attention value (or joint) matrix, in order.
        is_tied: whether the embeddings are the head, too.
        shares_values: whether several heads share one value matrix.
    """

    architecture: str
    layers: int
    experts: int
    value_layers: Sequence[int]
    is_tied: bool
    shares_values: bool


def type_of(name: str, columns: int, precision: Precision, shape: Shape) -> tuple[str, bool] | None:
    """The type of a tensor of two or more dimensions in a mixed file, and whether it only stands in for another.

    None if the quantizer leaves this tensor alone.

    Args:
        name: in the GGUF.
        columns: length of a row.
    """
    if precision.body is None or not name.endswith(".weight") or any(part in name for part in NOT_QUANTIZED):
        return None
    wanted = _wanted(name, columns, precision, shape)
    if columns % block_size(wanted) == 0:
        return wanted, wanted == "Q8_0" and columns % 256 != 0
    instead = FALLBACK.get(wanted, wanted)
    return (instead if columns % block_size(instead) == 0 else "F16"), True


def block_size(kind: str) -> int:
    """Weights that are rounded together."""
    return 256 if kind.endswith("_K") else 32


def _wanted(name: str, columns: int, precision: Precision, shape: Shape) -> str:
    """The type, before it is asked whether a row can be cut into its blocks."""
    body, raised = str(precision.body), str(precision.raised)
    if name == "output.weight" or (shape.is_tied and name in ("token_embd.weight", "per_layer_token_embd.weight")):
        return "Q8_0" if columns % block_size(body) else "Q6_K"
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    if any(part in name for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")):
        if shape.experts == 8:
            return "Q8_0"
        rank = list(shape.value_layers).index(layer) if layer in shape.value_layers else layer
        wanted = raised if _gets_more(rank, len(shape.value_layers) or shape.layers) else body
        large = shape.architecture in ("llama", "qwen2") and shape.layers == 80 and shape.shares_values
        return "Q5_K" if large and wanted == "Q4_K" else wanted
    if "attn_k.weight" in name and shape.experts == 8:
        return "Q8_0"
    if "ffn_down" in name:
        return raised if _gets_more(layer, shape.layers) else body
    if "attn_output.weight" in name and shape.experts == 8 and body == "Q4_K":
        return "Q5_K"
    return body


def _gets_more(index: int, count: int) -> bool:
    """The first and last eighth, and every third between, are rounded more finely."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


class Kernel:
    """llama.cpp's own rounding, out of the runtime's library."""

    def __init__(self) -> None:
        import xllamacpp

        library = next(Path(xllamacpp.__file__).parent.glob("xllamacpp.*.so"), None) or next(
            Path(xllamacpp.__file__).parent.glob("xllamacpp*.pyd")
        )
        self._round = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self._round.restype = ctypes.c_size_t
        self._round.argtypes = [
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
        ]

    def round(self, kind: int, blocks: "np.ndarray", type_bytes: int) -> "np.ndarray":
        """Float32 blocks (count, weights of a block) → their bytes (count, type_bytes)."""
        import numpy as np

        blocks = np.ascontiguousarray(blocks, dtype=np.float32)
        count, weights = blocks.shape
        rounded = np.empty((count, type_bytes), dtype=np.uint8)
        written = self._round(kind, blocks.ctypes.data, rounded.ctypes.data, 0, count, weights, None)
        if written != rounded.nbytes:
            raise ValueError(f"llama.cpp wrote {written} bytes where {rounded.nbytes} were expected")
        return rounded
