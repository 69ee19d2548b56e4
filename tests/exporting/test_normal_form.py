"""The normal form of an adapter is the same adapter: PEFT's logits do not change, whatever its settings were."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lora_sft.errors import ModelError, VerificationError
from lora_sft.exporting import normal_form
from lora_sft.exporting.normal_form import ADAPTER, adapts_embeddings, refusals, write_normal_form
from lora_sft.exporting.target import Facts, Order
from lora_sft.model.base import BaseSpec
from lora_sft.model.tiny import tiny_tokenizer

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.08}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma3": Gemma3TextConfig(**SHAPE | {"tie_word_embeddings": True}),
    "mistral": MistralConfig(**SHAPE),
    "phi3": Phi3Config(**{name: value for name, value in SHAPE.items() if name != "head_dim"}),
    "gpt2": GPT2Config(**GPT2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
}
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, "down_proj": 7}},
    "alphas": {"alpha_pattern": {"layers.0.self_attn.k_proj": 5, "up_proj": 64}},
    "ranks and alphas with rslora": {
        "use_rslora": True,
        "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 2},
        "alpha_pattern": {"v_proj": 9, r".*\.mlp\..*": 10},
    },
    "one layer": {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*layers\.0\..*(v|o)_proj"},
    "all but": {"exclude_modules": ["k_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "o_proj", "lm_head"]},
}


def make_adapter(folder, config, dtype=torch.float32, **settings):
    """A random base and a random adapter → (folder of the base, folder of the adapter)."""
    base, adapter = folder / "base", folder / "adapter"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(base)
    is_gpt2 = config.model_type == "gpt2"
    chosen = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "fan_in_fan_out": is_gpt2} | settings
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
                assert "lora_" in name or settings
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    if dtype is not torch.float32:
        file = adapter / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    return base, adapter


def normal(folder, adapter, config, **options):
    (folder / "normal").mkdir()
    return folder / "normal", write_normal_form(adapter, folder / "normal", config, **options)


def logits(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 60).reshape(3, 19)).logits


def check(base, adapter, folder):
    wanted = logits(base, adapter)
    assert (wanted - logits(base)).abs().max() > 0.1, "the adapter must do something, or the comparison shows nothing"
    torch.testing.assert_close(logits(base, folder), wanted, rtol=0, atol=1e-5)
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    rank = settings["r"]
    assert settings["lora_alpha"] == rank
    assert [settings[name] for name in ("use_rslora", "rank_pattern", "alpha_pattern")] == [False, {}, {}]
    assert {tensor.shape[0] for name, tensor in tensors.items() if "_A" in name} == {rank}
    assert {tensor.shape[1] for name, tensor in tensors.items() if "_B" in name} == {rank}


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_every_kind_of_adapter_stay_the_same(kind, tmp_path):
    config = FAMILIES["llama"]
    base, adapter = make_adapter(tmp_path, config, **KINDS[kind])
    folder, form = normal(tmp_path, adapter, config)
    assert form.largest_difference < 1e-6
    check(base, adapter, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_every_family_stay_the_same(family, tmp_path):
    config = FAMILIES[family]
    first, last = {"phi3": ("qkv_proj", "down_proj"), "gpt2": ("c_attn", "c_fc")}.get(family, ("q_proj", "down_proj"))
    patterns = {"rank_pattern": {first: 2}, "alpha_pattern": {last: 3}}
    base, adapter = make_adapter(tmp_path, config, use_rslora=True, **patterns)
    check(base, adapter, normal(tmp_path, adapter, config)[0])


def test_a_start_that_left_the_base_alone_does_not_matter(tmp_path):
    config = FAMILIES["llama"]
    _, adapter = make_adapter(tmp_path, config)
    for start in ("eva", "gaussian", "mica", False):
        change(adapter, init_lora_weights=start)
        assert normal_form.write_normal_form(adapter, tmp_path, config).rank == 4


def test_the_numbers_are_as_by_hand(tmp_path):
    """Rank 2 with alpha 6 is scaled by 3; beside a module of rank 4 it gets two rows and columns of zeros."""
    config = FAMILIES["llama"]
    settings = {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}}
    _, adapter = make_adapter(tmp_path, config, **settings)
    folder, form = normal(tmp_path, adapter, config)
    old, new = (load_file(one / "adapter_model.safetensors") for one in (adapter, folder))
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    torch.testing.assert_close(new[f"{name}A.weight"][:2], old[f"{name}A.weight"], rtol=0, atol=0)
    torch.testing.assert_close(new[f"{name}B.weight"][:, :2], 3 * old[f"{name}B.weight"])
    assert new[f"{name}A.weight"][2:].count_nonzero() + new[f"{name}B.weight"][:, 2:].count_nonzero() == 0
    assert form.rank == 4
    assert form.notes == ("ranks 2, 4 → 4, filled with zeros", "scale 3 → 1, multiplied into B")


def test_a_higher_rank_can_be_asked_for(tmp_path):
    config = FAMILIES["llama"]
    base, adapter = make_adapter(tmp_path, config)
    folder, form = normal(tmp_path, adapter, config, rank=16)
    assert form.rank == 16
    check(base, adapter, folder)


@pytest.mark.parametrize(("alpha", "kept"), [(16, "bfloat16"), (12, "float32")])
def test_16_bits_are_kept_only_where_the_scale_is_exact_in_them(tmp_path, alpha, kept):
    config = FAMILIES["llama"]
    base, adapter = make_adapter(tmp_path, config, torch.bfloat16, lora_alpha=alpha)
    folder, form = normal(tmp_path, adapter, config)
    assert form.dtype == kept
    assert {str(tensor.dtype) for tensor in load_file(folder / "adapter_model.safetensors").values()} == {
        f"torch.{kept}"
    }
    check(base, adapter, folder)


REFUSED = {
    "DoRA": {"use_dora": True},
    "whole trained modules": {"modules_to_save": ["lm_head"]},
    "trains the biases": {"bias": "all"},
    "trained rows of the embeddings": {"trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_normal_form_is_refused_before_training_and_after(reason, tmp_path):
    config = FAMILIES["qwen2"]
    facts = Facts(LoraConfig(**REFUSED[reason]).to_dict(), config, None)
    assert [reason in refusal and "merge instead: lora-sft merge" in refusal for refusal in refusals(facts, {})] == [
        True
    ]
    _, adapter = make_adapter(tmp_path, config, **REFUSED[reason])
    with pytest.raises(ModelError, match=f"{reason}.*merge instead"):
        normal(tmp_path, adapter, config)
    # The tensors are looked at as well: settings that hide them do not help.
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(settings | dict.fromkeys(REFUSED[reason]) | {"bias": "none"})
    )
    with pytest.raises(ModelError, match=r"the tensor .* no form that every server reads right"):
        write_normal_form(adapter, tmp_path / "normal", config)


def test_adapted_experts_are_refused(tmp_path):
    config = Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    _, adapter = make_adapter(tmp_path, config, **targets)
    with pytest.raises(ModelError, match="adapts fused parameters"):
        normal(tmp_path, adapter, config)
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"target_parameters": None}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"experts\.lora_A.*adapts fused parameters"):
        write_normal_form(adapter, tmp_path / "normal", config)


def test_the_rest_of_a_mixture_of_experts_is_fine(tmp_path):
    config = Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    base, adapter = make_adapter(tmp_path, config, use_rslora=True, target_modules=["q_proj", "o_proj"])
    check(base, adapter, normal(tmp_path, adapter, config)[0])


def change(adapter, **settings):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_start_that_changed_the_base_is_refused_once_saved_not_before_training(tmp_path):
    config = FAMILIES["llama"]
    _, adapter = make_adapter(tmp_path, config)
    for start in ("pissa_niter_4", "olora", "loftq"):
        change(adapter, init_lora_weights=start)
        with pytest.raises(ModelError, match=f"init_lora_weights {start} belongs to a base that was changed"):
            write_normal_form(adapter, tmp_path, config)
    assert not refusals(Facts(LoraConfig(init_lora_weights="pissa").to_dict(), config, None), {})


def test_other_methods_and_a_grown_vocabulary_are_refused():
    config = FAMILIES["llama"]
    assert "ADALORA is another method" in refusals(Facts({"peft_type": "ADALORA"}, config, None), {})[0]
    assert "the vocabulary grew" in refusals(Facts({}, config, None, adds_tokens=True), {})[0]


def test_an_adapter_that_contradicts_its_settings_or_its_base_is_refused(tmp_path):
    config = FAMILIES["llama"]
    _, adapter = make_adapter(tmp_path, config)
    with pytest.raises(ModelError, match=r"which a gpt2 model has not; wrong base"):
        write_normal_form(adapter, tmp_path, FAMILIES["gpt2"])
    with pytest.raises(ModelError, match=r"from 48 to 32, but the base's weight is \(64, 48\); wrong base"):
        write_normal_form(adapter, tmp_path, LlamaConfig(**SHAPE | {"hidden_size": 64, "head_dim": 16}))
    change(adapter, r=8)
    with pytest.raises(ModelError, match=r"its rank in adapter_config\.json is 8"):
        write_normal_form(adapter, tmp_path, config)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    save_file(tensors, file)
    change(adapter, r=4)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj lacks one of its two matrices"):
        write_normal_form(adapter, tmp_path, config)
    file.unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors here"):
        write_normal_form(adapter, tmp_path, config)


def test_a_module_left_out_or_a_scale_forgotten_is_noticed(tmp_path, monkeypatch):
    config = FAMILIES["llama"]
    _, adapter = make_adapter(tmp_path, config)
    monkeypatch.setattr(normal_form, "_settings", lambda *args: SETTINGS(*args) | {"lora_alpha": 8})
    with pytest.raises(VerificationError, match=r"is another update: .* differs by 1"):
        write_normal_form(adapter, tmp_path, config)
    updates = normal_form.read_updates(adapter, json.loads((adapter / "adapter_config.json").read_text()))
    with pytest.raises(VerificationError, match="adapts other modules"):
        normal_form._largest_difference(updates, dict(list(updates.items())[1:]))
    broken = {
        module: normal_form.Update(update.a * float("nan"), update.b, update.scale)
        for module, update in updates.items()
    }
    with pytest.raises(VerificationError, match="differs by nan"):
        normal_form._largest_difference(updates, broken)


SETTINGS = normal_form._settings


def test_embeddings_that_are_adapted_are_named():
    llama, gpt2 = FAMILIES["llama"], FAMILIES["gpt2"]
    for settings, config, names in (
        ({"target_modules": ["embed_tokens", "q_proj"]}, llama, ["model.embed_tokens"]),
        ({"target_modules": ".*(q_proj|lm_head)"}, llama, ["lm_head"]),
        ({"target_modules": ["q_proj"]}, llama, []),
        ({"target_modules": "all-linear"}, llama, []),
        ({"target_modules": None}, llama, []),
        ({"target_modules": ["wte", "c_attn"]}, gpt2, ["transformer.wte"]),
    ):
        assert adapts_embeddings(Facts(settings, config, None)) == names


def test_the_target_writes_a_folder_that_talks_on_its_own(tmp_path):
    config = FAMILIES["llama"]
    base, adapter = make_adapter(tmp_path, config, use_rslora=True)
    tiny_tokenizer(["hello"], 300).save_pretrained(adapter)
    (adapter / "generation_config.json").write_text("{}")
    (adapter / "report.html").write_text("not needed to serve")
    folder = tmp_path / "out"
    folder.mkdir()
    result = ADAPTER.write(Order(adapter, BaseSpec(str(base)), folder, folder))
    assert result["verified"]["modules"] == 14
    assert result["verified"]["largest_relative_difference"] < 1e-6
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    check(base, adapter, folder)
