"""What a quantized base makes of its weights is made again from the files, to the bit; and a merge is built on it."""

import json
from dataclasses import asdict

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from lora_sft.errors import ModelError
from lora_sft.merging import quantized
from lora_sft.merging.fidelity import compare, logits_of
from lora_sft.merging.merge import merge
from lora_sft.merging.merged import open_merged
from lora_sft.merging.quantized import Quantization
from lora_sft.merging.write import write_model
from lora_sft.model.base import BaseSpec, load_base, quantization_record, quantized_modules, read_config, skeleton
from tests.merging.shapes import save_adapter, save_base

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 128), (300, 512), (17, 64)], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_four_bits_are_those_of_bitsandbytes(kind, double, shape, dtype, monkeypatch):
    monkeypatch.setattr(quantized, "PIECE", 1000)  # a few rows at a time
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    options = {"requires_grad": False, "compress_statistics": double, "quant_type": kind}
    stored = bitsandbytes.nn.Params4bit(weight.to(dtype), **options)._quantize("cpu")
    expected = functional.dequantize_4bit(stored.data, stored.quant_state)
    rows = Quantization(kind, double, dtype).restored(lambda start, stop: weight[start:stop], *shape)
    found = torch.cat([rows(start, min(start + 5, shape[0])) for start in range(0, shape[0], 5)])
    assert torch.equal(found, expected)


def test_blocks_that_cross_rows_are_restored_too():
    """On the CPU bitsandbytes itself restores such weights only as one row."""
    weight = torch.randn(96, 80, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight.flatten(), blocksize=64, quant_type="nf4")
    expected = functional.dequantize_4bit(packed, state).reshape(96, 80)
    rows = Quantization("nf4", False, torch.float32).restored(lambda start, stop: weight[start:stop], 96, 80)
    assert torch.equal(torch.cat([rows(start, start + 3) for start in range(0, 96, 3)]), expected)


def test_bitsandbytes_still_restores_odd_widths_wrongly_on_the_cpu(tmp_path):
    """When this fails, `refuse_odd_widths` can go."""
    weight = torch.randn(96, 80, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    wrong = (functional.dequantize_4bit(packed, state) - weight).abs().mean()
    state.shape = (96 * 80,)
    right = (functional.dequantize_4bit(packed, state).reshape(96, 80) - weight).abs().mean()
    assert wrong > 1.5 * right
    base = save_base("llama", tmp_path / "base", hidden_size=80)
    with pytest.raises(ModelError, match="q_proj has 80 inputs, no multiple of 64"):
        load_base(BaseSpec(str(base), quantization="nf4"))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_every_weight_of_a_quantized_base_is_made_again(family, kind, tmp_path):
    base = save_base(family, tmp_path / "base")
    spec = BaseSpec(str(base), quantization=kind, double_quant=True, dtype="bfloat16")
    live = load_base(spec)
    plain = skeleton(read_config(spec), spec)
    record = quantization_record(live)
    assert quantized_modules(plain) == quantized_modules(plain, record["skipped"])
    targets = ["c_fc"] if family == "gpt2" else ["q_proj"]
    adapter = save_adapter(base, tmp_path / "adapter", {"target_modules": targets})
    opened = open_merged(adapter, spec)
    for name, place in opened.base.places.items():
        if not opened.base.is_quantized(name):
            continue
        module = live.get_submodule(place.parameter.removesuffix(".weight"))
        expected = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).float()
        rows = opened.base.rows(name)(0, opened.base.stored[name].rows)
        assert torch.equal(rows, expected.T if family == "gpt2" else expected), name


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-4), ("float16", 1e-5)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_qlora_merge_is_the_adapter_on_its_quantized_base(family, dtype, bound, tmp_path):
    """Written in 16 bits; the reference computes in float32 on the weights that the 4-bit ones stand for."""
    base = save_base(family, tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter", {"target_modules": "all-linear", "use_rslora": True})
    spec = BaseSpec(str(base), quantization="nf4", double_quant=True, dtype=dtype)
    folder = tmp_path / "merged"
    folder.mkdir()
    write_model(open_merged(adapter, spec), folder, dtype)
    reference = PeftModel.from_pretrained(dequantized(spec), adapter).eval()
    probes = [torch.tensor([[5, 3, 90, 17, 2, 44, 61, 8]])]
    expected = logits_of(reference, probes)
    with reference.disable_adapter():
        bare = logits_of(reference, probes)
    found = compare(logits_of(load_base(BaseSpec(str(folder))).eval(), probes), expected, bare)
    assert found.adapter_effect > 0.01
    assert found.mean_kl <= bound
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == getattr(torch, dtype)


def dequantized(spec):
    """The base with what its quantized weights stand for, as a plain model in float32."""
    live, plain = load_base(spec), load_base(BaseSpec(spec.name, dtype=spec.dtype)).float()
    for name in quantized_modules(plain):
        weight = live.get_submodule(name).weight
        plain.get_submodule(name).weight.data = functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return plain


def test_an_adapter_of_a_gpu_in_float16_is_merged_on_a_cpu(tmp_path):
    """Where it is compared in float32, for want of kernels."""
    base = save_base("llama", tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter", {"target_modules": "all-linear"})
    recorded = asdict(BaseSpec(str(base), quantization="nf4", double_quant=True, dtype="float16", device="cuda:0"))
    (adapter / "manifest.json").write_text(json.dumps({"base": recorded}))
    result = merge(adapter, tmp_path / "merged")
    assert result["dtype"] == "float16"
    assert result["verified"]["how"] == "logits"
    assert result["verified"]["mean_kl"] < 1e-4
