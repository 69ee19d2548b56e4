"""A model's configuration → those of its family in other sizes."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "tie_word_embeddings", "head_dim"),
)

SIZES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "llama": {
        "1B": (2048, 8192, 16, 32, 8, 128256, True, 64),
        "3B": (3072, 8192, 28, 24, 8, 128256, True, 128),
        "8B": (4096, 14336, 32, 32, 8, 128256, False, 128),
        "70B": (8192, 28672, 80, 64, 8, 128256, False, 128),
    },
    "qwen2": {
        "0.5B": (896, 4864, 24, 14, 2, 151936, True, 64),
        "1.5B": (1536, 8960, 28, 12, 2, 151936, True, 128),
        "3B": (2048, 11008, 36, 16, 2, 151936, True, 128),
        "7B": (3584, 18944, 28, 28, 4, 152064, False, 128),
        "14B": (5120, 13824, 48, 40, 8, 152064, False, 128),
        "32B": (5120, 27648, 64, 40, 8, 152064, False, 128),
    },
    "qwen3": {
        "0.6B": (1024, 3072, 28, 16, 8, 151936, True, 128),
        "1.7B": (2048, 6144, 28, 16, 8, 151936, True, 128),
        "4B": (2560, 9728, 36, 32, 8, 151936, True, 128),
        "8B": (4096, 12288, 36, 32, 8, 151936, False, 128),
        "14B": (5120, 17408, 40, 40, 8, 151936, False, 128),
        "32B": (5120, 25600, 64, 64, 8, 151936, False, 128),
    },
    "mistral": {
        "7B": (4096, 14336, 32, 32, 8, 32768, False, 128),
        "24B": (5120, 32768, 40, 32, 8, 131072, False, 128),
    },
    "phi3": {
        "3.8B": (3072, 8192, 32, 32, 32, 32064, False, 96),
        "14B": (5120, 17920, 40, 40, 10, 100352, False, 128),
    },
}
"""{model type: {size: the values of `FIELDS`}}, as the published models have them."""


def relatives(shape: "PretrainedConfig") -> dict[str, "PretrainedConfig"]:
    """{size: configuration} of the sizes that the family is published in; of an unknown one only its own."""
    text = shape.get_text_config()
    found = {}
    for size, values in SIZES.get(str(text.model_type), {}).items():
        other = copy.deepcopy(shape)
        for name, value in zip(FIELDS, values, strict=True):
            if name != "head_dim" or hasattr(text, "head_dim"):
                setattr(other.get_text_config(), name, value)
        kinds = getattr(text, "layer_types", None)
        if kinds:
            other.get_text_config().layer_types = [kinds[0]] * other.get_text_config().num_hidden_layers
        found[size] = other
    return found or {"this one": shape}
