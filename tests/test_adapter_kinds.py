"""Every kind of adapter that the settings offer trains, loads in plain PEFT, and merges to the same model."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lora_sft import finetune
from lora_sft.model.base import keep_weights_unpacked, quantization_config
from lora_sft.model.loading import trained_base
from lora_sft.model.tiny import tiny_tokenizer
from tests.conftest import FEW, HARBOUR

KINDS = {
    "nf4": {},
    "float32": {"load_in_4bit": False},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
    "bfloat16": {"bf16": True},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-float32": {"use_dora": True, "load_in_4bit": False},
    "loraplus": {"loraplus_lr_ratio": 16.0},
    "gaussian": {"lora_init": "gaussian"},
    "orthogonal": {"lora_init": "orthogonal"},
    "mica": {"lora_init": "mica"},
    "pissa": {"lora_init": "pissa"},
    "pissa-fast": {"lora_init": "pissa_niter_4"},
    "olora": {"lora_init": "olora"},
    "eva": {"lora_init": "eva"},
    "loftq": {"lora_init": "loftq"},
    "names": {"lora_target_modules": "q_proj,v_proj"},
    "regex": {"lora_target_modules": r".*layers\.1\..*_proj"},
    "patterns": {"lora_rank_pattern": {"q_proj": 4}, "lora_alpha_pattern": {"k_proj": 64}},
    "embeddings": {"lora_target_modules": "embed_tokens,q_proj"},
    "modules-to-save": {"lora_modules_to_save": "lm_head,embed_tokens"},
    "bias": {"lora_config": {"bias": "all"}},
    "some-layers": {"lora_target_modules": "q_proj", "lora_config": {"layers_to_transform": [0]}},
    "new-tokens": {"new_tokens": "<a>,<b>"},
    "neftune": {"neftune_noise_alpha": 5.0},
    "8-bit-optimizer": {"optim": "adamw_8bit"},
    "paged-optimizer": {"optim": "paged_adamw_32bit"},
    "checkpointing": {"gradient_checkpointing": True},
    "random order": {"train_sampling_strategy": "random"},
    "packed": {"packing": True},
    "dropout": {"lora_dropout": 0.2},
}

# int8 arithmetic rounds the activations too, and bfloat16 everything; nothing else may differ.
TOLERANCE = {"int8": 5e-2, "bfloat16": 5e-2}


def check(base, folder, kind, settings):
    run = finetune(base, HARBOUR, output_dir=folder / "adapter", **FEW | settings)
    ids = run.tokenizer("Who are you? I am Pip.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        trained = run.model(input_ids=ids).logits.float()
        with run.model.disable_adapter():
            effect = (run.model(input_ids=ids).logits.float() - trained).abs().max()
        assert effect > 1e-2, "the adapter must do something, or the comparison shows nothing"
        tolerance = {"rtol": 0, "atol": TOLERANCE.get(kind, 1e-5)}
        torch.testing.assert_close(in_plain_peft(base, run, ids), trained, **tolerance)
        result = run.merge(folder / "merged")
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="auto")
        torch.testing.assert_close(merged(input_ids=ids).logits.float(), trained, **tolerance)
    assert result["verified"]["mean_kl"] < (1e-4 if kind in TOLERANCE else 1e-9)


def in_plain_peft(base, run, ids):
    spec = trained_base(run.output_dir, "cpu")
    plain = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, spec.dtype), quantization_config=quantization_config(spec)
    )
    keep_weights_unpacked(plain)
    if len(run.tokenizer) > plain.get_input_embeddings().num_embeddings:
        plain.resize_token_embeddings(len(run.tokenizer), mean_resizing=False)
    return peft.PeftModel.from_pretrained(plain, run.output_dir).eval()(input_ids=ids).logits.float()


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")  # Llama has no biases
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_loads_in_plain_peft_and_merges(kind, base, tmp_path):
    check(base, tmp_path, kind, KINDS[kind])


@pytest.mark.parametrize("kind", ["nf4", "new-tokens", "dora"])
def test_it_does_so_with_tied_embeddings(kind, tied_base, tmp_path):
    check(tied_base, tmp_path, kind, KINDS[kind])


@pytest.fixture(scope="module")
def moe_base(tmp_path_factory, harbour_texts):
    """A tiny Qwen3 mixture of experts, whose expert weights are fused into parameters."""
    folder = tmp_path_factory.mktemp("moe")
    tokenizer = tiny_tokenizer(harbour_texts, 512)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is")  # PEFT sets it right
@pytest.mark.parametrize("in_4bit", [True, False])
def test_weights_that_lie_the_other_way_round_are_merged_right(tmp_path, harbour_texts, in_4bit):
    """GPT-2 keeps its projections as (inputs, outputs); quantized they are (outputs, inputs)."""
    tokenizer = tiny_tokenizer(harbour_texts, 512)
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.08}
    config = GPT2Config(vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=1, pad_token_id=0, **shape)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    check(tmp_path / "base", tmp_path, "gpt2", {"load_in_4bit": in_4bit})


@pytest.mark.parametrize("in_4bit", [True, False])
def test_fused_expert_parameters_are_adapted(moe_base, tmp_path, in_4bit):
    targets = {
        "lora_target_modules": "q_proj",
        "lora_target_parameters": "mlp.experts.gate_up_proj,mlp.experts.down_proj",
    }
    check(moe_base, tmp_path, "moe", targets | {"load_in_4bit": in_4bit})


def test_new_tokens_are_learned_and_nothing_else_of_the_embeddings_is(base, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<a><b>"}]}] * 4
    run = finetune(
        base,
        rows,
        output_dir=tmp_path / "run",
        **FEW
        | {"new_tokens": "<a>,<b>", "lora_target_modules": "q_proj", "max_steps": 30, "learning_rate": 0.05}
        | {"max_lost_share": 1.0},  # one row, four times
    )
    names = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad and "lora" not in name]
    assert {name.split(".")[-3] for name in names} == {"token_adapter"}
    assert (
        sum(run.model.get_parameter(name).shape[0] for name in names) == 4
    )  # two rows of the embeddings, two of the head
    assert run.metrics["last_loss"] < 0.2 * run.metrics["first_loss"]
