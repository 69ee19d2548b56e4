"""How the base is loaded: what was asked for, or what the device can do, and said."""

import json
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from lora_sft.config import RunConfig
from lora_sft.errors import ModelError
from lora_sft.model.base import BaseSpec, choose_base, load_base, quantized_share, read_config
from lora_sft.model.device import choose_device, choose_dtype


def choose(base, **settings) -> BaseSpec:
    return choose_base(RunConfig(model_name_or_path=str(base), device="cpu", **settings))


def test_nf4_with_double_quantization_is_the_default_and_said(base, capsys):
    spec = choose(base)
    assert (spec.quantization, spec.double_quant, spec.dtype, spec.device) == ("nf4", True, "float32", "cpu")
    said = capsys.readouterr().err
    assert "precision: float32 (on the CPU" in said
    assert "base: 4-bit nf4 with double quantization (the default" in said


@pytest.mark.parametrize(
    ("settings", "quantization"),
    [
        ({"load_in_4bit": False}, None),
        ({"load_in_8bit": True}, "int8"),
        ({"bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"lora_init": "pissa"}, None),
    ],
)
def test_other_precisions_are_chosen_by_settings(base, settings, quantization):
    assert choose(base, **settings).quantization == quantization


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [("nf4", Linear4bit), ("fp4", Linear4bit), ("int8", Linear8bitLt), (None, torch.nn.Linear)],
)
def test_the_base_is_loaded_as_the_spec_says(base, quantization, kind):
    model = load_base(BaseSpec(str(base), quantization=quantization, double_quant=quantization == "nf4"))
    projection = model.model.layers[0].self_attn.q_proj
    assert type(projection) is kind
    if kind is Linear4bit:
        assert projection.weight.quant_type == quantization
        assert projection.weight.quant_state.nested is (quantization == "nf4")


def test_the_share_that_is_quantized_is_counted_by_hand(base):
    """Two layers of 7 linear modules: q, o of 64 × 64, k, v of half that, 3 of 64 × 128; twice 512 × 64 beside."""
    model = load_base(BaseSpec(str(base), quantization="nf4"))
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert quantized_share(model) == linear / (linear + 2 * 512 * 64 + 5 * 64)


def test_evaluating_leaves_4bit_weights_and_gradients_as_they_were(base):
    """On CPUs with AVX512-BF16 bitsandbytes would repack the weights in eval mode; elsewhere only the flag shows it."""
    model = load_base(BaseSpec(str(base), quantization="nf4", dtype="bfloat16"))
    projections = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert not any(module.support_avx512bf16_for_cpu for module in projections)
    before = [module.weight.data.clone() for module in projections]
    embedded = model.get_input_embeddings()(torch.tensor([[1, 2, 3]])).detach().requires_grad_()
    with torch.no_grad():
        model.eval()(inputs_embeds=embedded)
    assert all(torch.equal(old, module.weight.data) for old, module in zip(before, projections, strict=True))
    model.train()(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


def test_cuda_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ModelError, match="device: cuda is asked for, but"):
        choose_device("cuda")


def test_float16_on_the_cpu_is_refused():
    with pytest.raises(ModelError, match="needs a GPU"):
        choose_dtype(None, True, "cpu")
    assert choose_dtype(True, None, "cpu")[0] == "bfloat16"


@pytest.mark.parametrize(
    ("bf16", "fp16", "supported", "dtype"),
    [
        (None, None, True, "bfloat16"),
        (None, None, False, "float16"),
        (False, None, True, "float32"),
        (None, False, False, "float32"),
        (False, True, True, "float16"),
        (True, None, True, "bfloat16"),
    ],
)
def test_precision_on_a_gpu(bf16, fp16, supported, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert choose_dtype(bf16, fp16, "cuda:0")[0] == dtype


def test_a_model_that_cannot_be_had_is_told_before_weights_are_read(base, tmp_path):
    shutil.copytree(base, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    shutil.copytree(base, tmp_path / "quantized")
    config = json.loads((base / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    shutil.copytree(base, tmp_path / "encoder")
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    for name, words in (
        ("/no/such/model", "no such folder"),
        ("nobody/nothing", "cannot be had"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "pickled", "no .safetensors file"),
        (tmp_path / "quantized", r"is stored quantized \(gptq\)"),
        (tmp_path / "encoder", "vit is no causal language model"),
    ):
        with pytest.raises(ModelError, match=words):
            read_config(choose(name))


def test_a_local_folder_is_recorded_whole_and_a_hub_name_as_it_is(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    assert choose(base.name).name == str(base)
    assert choose("some/name").name == "some/name"
