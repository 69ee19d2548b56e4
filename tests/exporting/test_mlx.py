"""What is exported for MLX computes the logits of the adapter in mlx-lm, and stops where it was taught to."""

import json
import shlex

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config

from lora_sft.errors import ModelError, VerificationError
from lora_sft.exporting import mlx
from lora_sft.exporting.mlx import MLX, MLX_ADAPTER, config_for_mlx
from lora_sft.exporting.target import Facts, Order
from lora_sft.model.base import BaseSpec
from lora_sft.model.tiny import tiny_tokenizer
from tests.exporting.test_normal_form import FAMILIES, GPT2, SHAPE, make_adapter

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3 = {"num_hidden_layers": 3, "sliding_window_pattern": 3, "tie_word_embeddings": True}
READ_BY_MLX = {
    **{family: FAMILIES[family] for family in ("llama", "qwen2", "qwen3", "mistral", "phi3")},
    # mlx-lm rounds the factor of the embeddings, √hidden_size, to bfloat16: exact for 64.
    "gemma3": Gemma3TextConfig(**SHAPE | GEMMA3 | {"hidden_size": 64}),
    "tied": LlamaConfig(**SHAPE | {"tie_word_embeddings": True}),
    "scaled rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
}


@pytest.fixture
def mlx_lm():
    return pytest.importorskip("mlx_lm", reason="mlx-lm runs on Apple silicon and on Linux: pip install 'mlx-lm[cpu]'")


def exported(target, folder, config, spec=None, onto="trained", options=None, **settings):
    """A random adapter on a random base, exported → (base, adapter, output, result)."""
    base, adapter = make_adapter(folder, config, **settings)
    tokenizer = tiny_tokenizer(["hello there, who are you?"], 300)
    for one in (base, adapter):
        tokenizer.save_pretrained(one)
        (one / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    output = folder / "out"
    output.mkdir()
    order = Order(adapter, spec or BaseSpec(str(base)), output, output, onto, options or {})
    return base, adapter, output, target.write(order)


def logits_in_mlx(model, adapter=None):
    """Read with mlx-lm's own function, as a user would."""
    import mlx.core as mx
    from mlx_lm import load

    mx.set_default_device(mx.cpu)
    loaded, _ = load(str(model), adapter_path=str(adapter) if adapter else None)
    return torch.tensor(loaded(mx.array(torch.arange(3, 60).reshape(3, 19).tolist())).tolist())


def logits_in_peft(base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 60).reshape(3, 19)).logits


@pytest.mark.parametrize("family", READ_BY_MLX)
def test_the_whole_model_has_the_adapters_logits(family, mlx_lm, tmp_path):
    base, adapter, output, result = exported(MLX, tmp_path, READ_BY_MLX[family], use_rslora=True)
    torch.testing.assert_close(logits_in_mlx(output), logits_in_peft(base, adapter), rtol=0, atol=1e-4)
    assert result["dtype"] == "float32"
    assert result["verified"]["max_abs_logit_diff"] < 1e-4
    assert result["verified"]["mlx"]["max_abs_logit_diff_from_transformers"] < 1e-4


def publish(base, config):
    """A base as it lies on the hub: its settings as they were before transformers 5."""
    file = base / "config.json"
    stored = config_for_mlx(json.loads(file.read_text()), config)
    stored.pop("rope_parameters", None)
    file.write_text(json.dumps(stored))


@pytest.mark.parametrize("family", READ_BY_MLX)
def test_the_adapter_on_its_base_has_the_adapters_logits(family, mlx_lm, tmp_path):
    config = READ_BY_MLX[family]
    settings = {"use_rslora": True, "rank_pattern": {r"layers\.1\..*": 3}, "layers_to_transform": [1]}
    targets = ["qkv_proj", "down_proj"] if family == "phi3" else ["q_proj", "down_proj"]
    base, adapter = make_adapter(tmp_path, config, target_modules=targets, **settings)
    publish(base, config)
    tiny_tokenizer(["hello there, who are you?"], 300).save_pretrained(base)
    output = tmp_path / "out"
    output.mkdir()
    result = MLX_ADAPTER.write(Order(adapter, BaseSpec(str(base)), output, output))
    torch.testing.assert_close(logits_in_mlx(base, output), logits_in_peft(base, adapter), rtol=0, atol=1e-4)
    assert result["verified"]["modules"] == 2
    assert result["verified"]["max_abs_logit_diff"] < 1e-4


def test_embeddings_of_their_own_are_adapted_as_well(mlx_lm, tmp_path):
    base, adapter, output, result = exported(
        MLX_ADAPTER, tmp_path, FAMILIES["llama"], target_modules=["embed_tokens", "lm_head", "q_proj"]
    )
    torch.testing.assert_close(logits_in_mlx(base, output), logits_in_peft(base, adapter), rtol=0, atol=1e-4)
    assert result["verified"]["modules"] == 4


def test_a_model_in_16_bits_is_compared_in_32(mlx_lm, tmp_path):
    _, _, output, result = exported(MLX, tmp_path, FAMILIES["qwen3"], options={"dtype": "bfloat16"})
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    assert result["verified"]["mlx"]["max_abs_logit_diff_from_transformers"] < 1e-4
    assert 1e-4 < result["verified"]["max_abs_logit_diff"] < 0.1


def test_without_mlx_the_files_are_the_same_and_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(mlx, "is_installed", lambda: False)
    _, _, output, result = exported(MLX, tmp_path, FAMILIES["llama"])
    assert result["verified"]["mlx"] == mlx.NOT_INSTALLED
    assert result["verified"]["how"] == "tensors"
    assert "max_abs_logit_diff" not in result["verified"]
    assert json.loads((output / "config.json").read_text())["rope_theta"] == 10000.0


def test_a_model_larger_than_the_memory_is_written_but_not_run(mlx_lm, tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    _, _, output, result = exported(MLX, tmp_path, FAMILIES["llama"])
    assert "not run: it takes 0.0 GiB of memory, and 0.0 GiB are free" in result["verified"]["mlx"]
    assert (output / "model.safetensors").is_file()


def test_the_adapters_file_is_the_normal_form_turned_round(tmp_path, monkeypatch):
    """mlx-lm multiplies from the right: x · a (inputs, rank) · b (rank, outputs), times the scale."""
    monkeypatch.setattr(mlx, "is_installed", lambda: False)
    base, adapter = make_adapter(tmp_path, FAMILIES["qwen2"], target_modules=["k_proj"], lora_alpha=8)
    publish(base, FAMILIES["qwen2"])
    output = tmp_path / "out"
    output.mkdir()
    result = MLX_ADAPTER.write(Order(adapter, BaseSpec(str(base)), output, output))
    assert result["verified"]["mlx"] == mlx.NOT_INSTALLED
    old, new = load_file(adapter / "adapter_model.safetensors"), load_file(output / "adapters.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    assert torch.equal(new[f"{name}.lora_a"], old[f"base_model.model.{name}.lora_A.weight"].T)
    assert torch.equal(new[f"{name}.lora_b"], 2 * old[f"base_model.model.{name}.lora_B.weight"].T)
    settings = json.loads((output / "adapter_config.json").read_text())
    assert settings["num_layers"] == 2
    assert settings["lora_parameters"] == {
        "rank": 4,
        "scale": 1.0,
        "dropout": 0.0,
        "keys": [f"model.layers.{layer}.self_attn.k_proj" for layer in range(2)],
    }


def test_settings_are_written_where_mlx_looks_for_them():
    def added(config, **stored):
        found = config_for_mlx({"model_type": config.model_type, **stored}, config)
        return {name: found.get(name) for name in ("rope_theta", "rope_scaling", "rope_local_base_freq", "n_ctx")}

    scaled = {name: value for name, value in LLAMA3.items() if name != "rope_theta"} | {"type": "llama3"}
    assert added(READ_BY_MLX["scaled rope"]) == {
        "rope_theta": 50000.0,
        "rope_scaling": scaled,
        "rope_local_base_freq": None,
        "n_ctx": None,
    }
    # What the base says itself stays as it is.
    assert added(READ_BY_MLX["scaled rope"], rope_scaling={"factor": 2.0})["rope_scaling"] == {"factor": 2.0}
    gemma = added(READ_BY_MLX["gemma3"])
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1_000_000.0, 10_000.0)
    assert config_for_mlx({}, READ_BY_MLX["gemma3"])["sliding_window_pattern"] == 3
    assert added(GPT2Config(**GPT2))["n_ctx"] == 64
    odd = Gemma3TextConfig(**SHAPE, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ModelError, match="full attention in every n-th layer"):
        config_for_mlx({}, odd)


def test_a_model_that_mlx_reads_otherwise_is_refused(mlx_lm, tmp_path, monkeypatch):
    """Without the frequencies where mlx-lm looks for them, it takes its own in silence."""
    monkeypatch.setattr(mlx, "config_for_mlx", lambda stored, config: stored)
    with pytest.raises(VerificationError, match="mlx-lm computes other logits: they differ by up to"):
        exported(MLX, tmp_path, LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 300.0}))


def test_an_adapter_whose_base_mlx_reads_otherwise_is_refused(mlx_lm, tmp_path):
    with pytest.raises(VerificationError, match="does not read this model as transformers does"):
        exported(MLX_ADAPTER, tmp_path, READ_BY_MLX["scaled rope"])


def test_without_mlx_such_a_base_is_refused_on_sight(tmp_path, monkeypatch):
    monkeypatch.setattr(mlx, "is_installed", lambda: False)
    with pytest.raises(ModelError, match=r"has rope_parameters, which not all of mlx-lm reads.*target mlx"):
        exported(MLX_ADAPTER, tmp_path, READ_BY_MLX["scaled rope"])


def test_stop_tokens_that_only_the_adapter_knows_are_refused(tmp_path):
    base, adapter = make_adapter(tmp_path, FAMILIES["llama"])
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    publish(base, FAMILIES["llama"])
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    with pytest.raises(ModelError, match="token 7 was trained to end a reply"):
        MLX_ADAPTER.write(Order(adapter, BaseSpec(str(base)), tmp_path, tmp_path))


def test_what_cannot_be_served_is_refused_beforehand(monkeypatch):
    def reasons(target, config, settings=None, **options):
        return target.refusals(Facts(settings or {}, config, None), options)

    tied, llama = READ_BY_MLX["tied"], FAMILIES["llama"]
    assert (
        "mlx-lm would put the update into both" in reasons(MLX_ADAPTER, tied, {"target_modules": ["embed_tokens"]})[0]
    )
    assert reasons(MLX_ADAPTER, llama, {"target_modules": ["embed_tokens"]}) == []
    assert "DoRA" in reasons(MLX_ADAPTER, llama, {"use_dora": True})[0]
    assert reasons(MLX, llama, {"use_dora": True}) == []
    assert "dtype 'int4' is not one of" in reasons(MLX, llama, dtype="int4")[0]
    monkeypatch.setattr(mlx, "is_installed", lambda: False)
    assert "same names in mlx-lm" in reasons(MLX_ADAPTER, GPT2Config(**GPT2))[0]


def test_an_architecture_unknown_to_mlx_is_refused_beforehand(mlx_lm):
    config = LlamaConfig(**SHAPE)
    config.model_type = "of_tomorrow"
    assert "does not know of_tomorrow models" in MLX.refusals(Facts({}, config, None), {})[0]


def test_the_command_says_all_that_was_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(mlx, "is_installed", lambda: False)
    config = FAMILIES["llama"]
    base, adapter = make_adapter(tmp_path, config)
    publish(base, config)
    tiny_tokenizer(["hello"], 300).save_pretrained(adapter)
    (adapter / "manifest.json").write_text(json.dumps({"chat_template_kwargs": {"enable_thinking": False}}))
    folder, output = tmp_path / "staged", tmp_path / "my model"
    folder.mkdir()
    spec = BaseSpec(str(base), quantization="nf4", dtype="bfloat16")
    result = MLX_ADAPTER.write(Order(adapter, spec, folder, output))
    command = shlex.split(result["serve"])
    assert command[:5] == ["mlx_lm.server", "--model", str(base), "--adapter-path", str(output)]
    assert command[-2:] == ["--chat-template-args", '{"enable_thinking": false}']
    assert f"cat '{output}'/chat_template.jinja" in result["serve"]
    assert "trained on a base in nf4, served on the full-precision one" in result["notes"][-1]
    on_hub = Order(adapter, BaseSpec("org/base", "abc123"), folder, output)
    assert '--model "$(hf download --quiet org/base --revision abc123)"' in mlx._serve_adapter(on_hub)


def test_long_texts_that_mlx_sees_otherwise_are_mentioned():
    short = Phi3Config(**{name: value for name, value in SHAPE.items() if name != "head_dim"}, sliding_window=8)
    assert mlx._differences(short, "float32") == [
        "mlx-lm attends to the whole text, this model to 8 tokens: longer texts can differ"
    ]
    assert mlx._differences(FAMILIES["llama"], "float32") == []


@pytest.mark.parametrize("target", [MLX, MLX_ADAPTER])
def test_a_gemma_is_compared_with_its_factor_rounded_as_in_mlx(target, mlx_lm, tmp_path):
    """√32 is 5.657, and 5.656 in bfloat16: without that the difference is above 1e-4."""
    base, adapter, output, result = exported(target, tmp_path, Gemma3TextConfig(**SHAPE | GEMMA3))
    assert result["verified"]["max_abs_logit_diff"] < 1e-4
    assert "rounds the factor of a Gemma 3's embeddings" in result["notes"][-1]
    found = logits_in_mlx(output) if target is MLX else logits_in_mlx(base, output)
    assert 1e-4 < (found - logits_in_peft(base, adapter)).abs().max() < 1e-2


def test_a_base_in_4_bits_is_merged_as_it_was_trained(mlx_lm, tmp_path):
    """The whole model stands for the dequantized weights; onto `original`, it is compared on that one."""
    config = LlamaConfig(**SHAPE | {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16})
    spec = BaseSpec(str(tmp_path / "base"), quantization="nf4", double_quant=True)
    _, _, _, result = exported(MLX, tmp_path, config, spec)
    assert result["verified"]["max_abs_logit_diff"] < 1e-3
    (tmp_path / "second").mkdir()
    _, _, _, original = exported(MLX, tmp_path / "second", config, spec, onto="original")
    assert original["verified"]["max_abs_logit_diff"] < 1e-3  # compared with the adapter on that base
