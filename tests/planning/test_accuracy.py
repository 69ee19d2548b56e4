"""The memory that is foretold is the memory that a training takes, by the record of the CPU's allocator."""

import pytest

from tests.planning.measured import Case, foretold, measured

FULL, SOME = {"gradient_checkpointing": True}, {"gradient_checkpointing": 2}
PACKED = {"packing": True, "max_length": 256, "per_device_train_batch_size": 2}
SMALL_ADAM = {"optim": "adamw_8bit", "lora_r": 32}
DEEP = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
CASES = {
    "llama, float32": Case(),
    "llama, NF4": Case("llama", "nf4", "bfloat16"),
    "llama, logits and their loss, padded": Case(settings={"fast_kernels": False}),
    "llama, NF4 in float32, all recomputed": Case("llama", "nf4", "float32", FULL),
    "llama, NF4, DoRA": Case("llama", "nf4", "bfloat16", {"use_dora": True}),
    "llama, an adapter in bfloat16, moments in pages": Case(
        "llama", "nf4", "bfloat16", {"adapter_dtype": "bfloat16", "optim": "paged_adamw_32bit"}
    ),
    "llama, the head trained whole": Case(settings={"lora_modules_to_save": ["lm_head"]}),
    "llama, eager attention": Case(settings={"attn_implementation": "eager"}),
    "llama of 280 M": Case("llama", "nf4", "bfloat16", FULL, (300, 210), DEEP),
    "qwen3, NF4, some recomputed, dropout": Case("qwen3", "nf4", "bfloat16", SOME | {"lora_dropout": 0.1}),
    "qwen3, packed, two micro-batches": Case(
        "qwen3", None, "float32", PACKED | {"gradient_accumulation_steps": 2}, (160, 70, 130, 110, 90, 200)
    ),
    "qwen3, label smoothing, no clipping": Case(
        "qwen3", None, "bfloat16", {"label_smoothing": 0.1, "max_grad_norm": 0}
    ),
    "gemma3, float32": Case("gemma3_text"),
    "gemma3, NF4, logits and their loss": Case("gemma3_text", "nf4", "bfloat16", {"fast_kernels": False}),
    "mistral, moments in 8 bits": Case("mistral", None, "bfloat16", SMALL_ADAM),
    "qwen3 with experts, NF4": Case("qwen3_moe", "nf4", "bfloat16"),
    "gpt2": Case("gpt2"),
    "llama, int8": Case("llama", "int8", "bfloat16"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")  # PEFT sets them itself
@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_foretold_to_half_a_per_cent_and_the_step_to_one(name):
    case = CASES[name]
    plan, real = foretold(case), measured(case)
    assert plan.model == real.model
    assert plan.step == pytest.approx(real.step, rel=0.01)
    assert plan.model + plan.step == pytest.approx(real.model + real.step, rel=0.005)
