"""What is said of a model before packing is what is true of it: 30 families, and it is left as it was."""

from dataclasses import replace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_sft.model.base import keep_weights_unpacked
from lora_sft.model.tiny import save_tiny, tiny_model
from lora_sft.training.batching import Batching
from lora_sft.training.isolation import leaks, probe, settle
from tests.families import tiny

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
SOME_LOCAL = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

APART = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": SOME_LOCAL,
    "gemma3_text": SOME_LOCAL,
    "mistral": {"sliding_window": 4},
    "phi": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "granite": {},
    "olmo2": {},
    "cohere2": {},
    "smollm3": {},
    "llama4_text": EXPERTS
    | {
        "attention_chunk_size": 4,
        "intermediate_size_mlp": 64,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
}
# Recurrences that run on, and attention whose mask is made without looking at `position_ids`.
LEAKING = {
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
    "minimax": EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "gpt_oss": EXPERTS | SOME_LOCAL,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
}
# These take `seq_idx`, and refuse a packed row where the kernels that honour it are not installed.
WITHOUT_KERNELS = {
    "qwen3_next": EXPERTS | LINEAR,
    "qwen3_5_text": LINEAR,
    "granitemoehybrid": EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize("family", APART)
def test_these_keep_packed_examples_apart(family, one_row):
    model = tiny(family, APART[family])
    assert leaks(model, 128, one_row) is None
    measured = probe(model, 128, one_row)
    assert max(difference.found for difference in [*measured.influence, measured.company]) < 1e-4


@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize("family", LEAKING)
def test_these_leak_in_silence(family, one_row):
    model = tiny(family, LEAKING[family])
    why_not = f"{family} lets one packed example see another: its words move the other's"
    assert leaks(model, 128, one_row).startswith(why_not)
    assert min(difference.found for difference in probe(model, 128, one_row).influence) > 0.1


@pytest.mark.parametrize("family", WITHOUT_KERNELS)
def test_these_refuse_a_packed_row_without_their_kernels(family):
    assert "does not take a packed row (ValueError: `causal_conv1d_fn`" in leaks(tiny(family, WITHOUT_KERNELS[family]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "shape"), [("llama", {}), ("qwen2_moe", EXPERTS), ("mamba2", LEAKING["mamba2"])], ids=lambda v: str(v)
)
def test_rounding_is_not_taken_for_a_leak_nor_a_leak_for_rounding(family, shape, dtype):
    model = tiny(family, shape).to(dtype)
    assert (leaks(model, 128) is None) == (family in APART)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_kernel_is_asked_for_itself(attention):
    assert leaks(tiny("llama", {}, attn_implementation=attention), 128) is None


def test_a_model_that_counts_positions_on_is_found_out():
    """Attention may be isolated and the positions wrong; then an example has other logits than alone."""
    model = tiny("gpt2", APART["gpt2"])
    embed = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: embed(torch.arange(ids.shape[-1])[None])
    assert leaks(model, 128).startswith("gpt2 gives an example other logits in a packed row than alone")


def test_an_adapter_with_dropout_changes_nothing():
    model = peft.get_peft_model(tiny("llama", {}), peft.LoraConfig(lora_dropout=0.5, init_lora_weights=False))
    assert leaks(model, 128) is None
    leaking = peft.get_peft_model(
        tiny("mamba2", LEAKING["mamba2"]), peft.LoraConfig(target_modules=["in_proj"], init_lora_weights=False)
    )
    assert leaks(leaking, 128).startswith("mamba2 lets one packed example see another")


@pytest.mark.parametrize(
    "adapter",
    [{"trainable_token_indices": [5, 6]}, {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
)
def test_an_adapter_on_the_embeddings_is_no_hindrance(adapter):
    assert (
        leaks(peft.get_peft_model(tiny("llama", {}), peft.LoraConfig(**{"target_modules": ["q_proj"]} | adapter)))
        is None
    )


def test_a_model_that_fails_at_every_row_fails_aloud():
    model = tiny("llama", {})
    model.lm_head.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        leaks(model)


@pytest.mark.parametrize(
    "method",
    [
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        BitsAndBytesConfig(load_in_8bit=True),
    ],
    ids=["nf4", "int8"],
)
def test_a_quantized_base_keeps_them_apart(method, tmp_path, harbour_texts):
    folder = save_tiny(tmp_path, harbour_texts, initializer_range=0.2)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=method)
    keep_weights_unpacked(model)
    assert leaks(peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False))) is None


def test_the_model_is_left_as_it_was():
    model = peft.get_peft_model(tiny_model(128), peft.LoraConfig(lora_dropout=0.5))
    model.train()
    model.base_model.model.lm_head.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert leaks(model) is None
    assert torch.equal(torch.rand(3), expected)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_where_it_leaks_similar_lengths_are_batched_and_it_is_said(capsys):
    asked = Batching(2, 2048, packing=True)
    assert settle(asked, tiny("llama", {})) == asked
    alone = Batching(1, 2048, packing=True)
    assert settle(alone, tiny("llama", {})) == replace(alone, one_row=True)
    assert not capsys.readouterr().err
    found = settle(asked, tiny("mamba2", LEAKING["mamba2"]))
    assert (found.packing, found.order) == (False, "group_by_length")
    assert "packing is off: mamba2 lets one packed example see another" in capsys.readouterr().err
