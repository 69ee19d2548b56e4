"""Bases of many families and adapters of many kinds, all tiny, random and in float32."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

VOCABULARY = 96

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2}
GEMMA = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"head_dim": 16}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**EXPERTS, "moe_intermediate_size": 32, "num_experts": 4, "head_dim": 16},
    ),
    "mixtral": ("MixtralConfig", {**EXPERTS, "num_local_experts": 4, "head_dim": 16}),
}

ALL = "all-linear"
Shape = tuple[str, dict[str, Any]]

# {name: (family, what LoraConfig is given)}: every kind of thing that PEFT trains, and every family once more plainly.
SHAPES: dict[str, Shape] = {
    "plain": ("llama", {"target_modules": ALL}),
    "rslora": ("llama", {"target_modules": ALL, "use_rslora": True}),
    "dora": ("llama", {"target_modules": ALL, "use_dora": True}),
    "rank pattern": ("llama", {"target_modules": ALL, "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 6}}),
    "alpha pattern": ("llama", {"target_modules": ALL, "alpha_pattern": {"k_proj": 64, "down_proj": 1}}),
    "rslora and patterns": (
        "llama",
        {
            "target_modules": ALL,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 32, "v_proj": 2},
        },
    ),
    "one layer": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "all biases": ("llama", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "lora biases": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "head trained whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings and norms trained whole": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "input_layernorm"]},
    ),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings by dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "embeddings and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied embeddings": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "tied head trained whole": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied together": (
        "llama-tied",
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True},
    ),
    "some tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 90]}}),
    "some tokens of tied embeddings": (
        "llama-tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 90]}},
    ),
    "added tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [96, 97], "lm_head": [96, 97]}},
    ),
    "qwen2": ("qwen2", {"target_modules": ALL}),
    "qwen3": ("qwen3", {"target_modules": ALL, "use_rslora": True}),
    "gemma3": ("gemma3", {"target_modules": ALL}),
    "gemma3 embeddings": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "mistral": ("mistral", {"target_modules": ALL, "use_dora": True}),
    "phi3": ("phi3", {"target_modules": ALL, "rank_pattern": {"qkv_proj": 8}}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 by dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "qwen3-moe": ("qwen3-moe", {"target_modules": ALL}),
    "qwen3-moe experts": (
        "qwen3-moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "mixtral experts": (
        "mixtral",
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}

ADDED = {"added tokens": VOCABULARY + 2}


def save_base(family: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A random model of a family, as transformers saves it."""
    config, own = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**COMMON | own | more))
    for parameter in model.parameters():  # biases and norms start at 0 and 1, where mistakes do not show
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, settings: dict[str, Any], seed: int = 1, vocabulary: int = 0) -> Path:
    """A random adapter whose every part does something."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    given = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | settings
    adapted = get_peft_model(model, LoraConfig(**given))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            size = 0.3 if "magnitude" in name else 0.08
            parameter.data += size * torch.randn_like(parameter) * (parameter.abs() if "magnitude" in name else 1)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load_live(base: Path, adapter: Path, vocabulary: int = 0) -> Any:
    """The adapter on its base in plain PEFT: what a merge must equal."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()
