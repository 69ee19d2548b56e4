"""Tiny random models of many families of transformers."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def tiny(family: str, fields: dict[str, Any], **options: Any) -> Any:
    """A random model of a family, in eval mode, with `fields` of its configuration."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SHAPE | fields)), **options)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large enough that a token far away would be felt
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
