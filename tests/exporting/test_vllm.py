"""What vLLM would load computes the adapter's logits, and the command tells it all that was trained."""

import argparse
import json
import shlex

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_sft.errors import ModelError
from lora_sft.exporting import vllm
from lora_sft.exporting.target import Facts, Order
from lora_sft.exporting.vllm import VLLM
from lora_sft.model.base import BaseSpec
from lora_sft.model.tiny import tiny_tokenizer
from tests.exporting.test_normal_form import FAMILIES, logits, make_adapter


def exported(folder, config=FAMILIES["qwen3"], spec=None, output=None, options=None, **settings):
    base, adapter = make_adapter(folder, config, **settings)
    tiny_tokenizer(["hello"], 300).save_pretrained(adapter)
    (adapter / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (adapter / "manifest.json").write_text(json.dumps({"chat_template_kwargs": {"enable_thinking": False}}))
    staged = folder / "staged"
    staged.mkdir()
    order = Order(adapter, spec or BaseSpec(str(base)), staged, output or folder / "out", options=options or {})
    return base, adapter, staged, VLLM.write(order)


def read_as_vllm_does(base, folder):
    """One alpha / r for every module, whatever patterns say; names of modules from the tensors alone."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert [settings[name] for name in ("modules_to_save", "use_dora", "bias")] == [None, False, "none"]
    scale = settings["lora_alpha"] / settings["r"] ** (0.5 if settings["use_rslora"] else 1)
    model, tensors = AutoModelForCausalLM.from_pretrained(base).eval(), load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            b = tensors.pop(name.replace("lora_A", "lora_B"))
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight += scale * b @ tensors.pop(name)
        assert not tensors
        return model(input_ids=torch.arange(3, 60).reshape(3, 19)).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_one_scale_for_all_modules_gives_the_adapters_logits(family, tmp_path):
    first = "qkv_proj" if family == "phi3" else "q_proj"
    patterns = {"rank_pattern": {first: 2}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True}
    base, adapter, folder, result = exported(tmp_path, FAMILIES[family], **patterns)
    wanted = logits(base, adapter)
    torch.testing.assert_close(read_as_vllm_does(base, folder), wanted, rtol=0, atol=1e-5)
    assert (read_as_vllm_does(base, adapter) - wanted).abs().max() > 1e-2, "the original goes wrong, as in the field"
    assert result["verified"]["largest_relative_difference"] < 1e-6
    assert result["verified"]["vllm"] == "not run here"


def parse(command):
    """As much of vLLM's command line as is used."""
    words = shlex.split(command)
    assert words[:2] == ["vllm", "serve"]
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for flag in ("revision", "dtype", "tokenizer", "chat-template", "generation-config", "lora-modules"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--default-chat-template-kwargs", type=json.loads)
    parser.add_argument("--max-lora-rank", type=int, choices=vllm.RANK_STEPS)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser.parse_args(words[2:])


def test_the_command_names_base_adapter_template_and_stop_tokens(tmp_path):
    base, _, folder, result = exported(tmp_path, r=9, output=tmp_path / "my model")
    told, output = parse(result["serve"]), str(tmp_path / "my model")
    assert told.model == str(base)
    assert told.enable_lora
    assert told.max_lora_rank == 16, "the step above 9"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 9
    assert told.lora_modules == f"my-model={output}"
    assert result["model"] == "my-model"
    assert told.tokenizer == told.generation_config == output
    assert told.chat_template == f"{output}/chat_template.jinja"
    assert told.default_chat_template_kwargs == {"enable_thinking": False}
    assert told.revision is told.dtype is None
    assert not told.trust_remote_code
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).is_file()


def test_a_base_on_the_hub_is_named_with_its_commit(tmp_path):
    _, adapter, folder, _ = exported(tmp_path)
    spec = BaseSpec("org/base", "abc123", dtype="bfloat16", trust_remote_code=True)
    form = vllm.NormalForm(256, (), "float32", 0.0)
    command = vllm.serve_command(Order(adapter, spec, folder, tmp_path / "a,b"), form, "pip")
    told = parse(shlex.join(command))
    assert (told.model, told.revision, told.dtype, told.trust_remote_code) == ("org/base", "abc123", "bfloat16", True)
    assert told.max_lora_rank == 256
    assert json.loads(told.lora_modules) == {"name": "pip", "path": f"{tmp_path}/a,b"}


def test_a_foreign_adapter_without_tokenizer_leaves_the_bases_in_place(tmp_path):
    base, adapter = make_adapter(tmp_path, FAMILIES["llama"])
    (tmp_path / "out").mkdir()
    result = VLLM.write(
        Order(adapter, BaseSpec(str(base)), tmp_path / "out", tmp_path / "out", options={"name": "pip"})
    )
    told = parse(result["serve"])
    assert told.tokenizer is told.chat_template is told.generation_config is told.default_chat_template_kwargs is None
    assert told.lora_modules == f"pip={tmp_path}/out"


def reasons(settings, config=FAMILIES["llama"], **options):
    return VLLM.refusals(Facts(settings, config, None), options)


def test_what_vllm_does_not_take_is_refused_beforehand():
    assert reasons({"target_modules": ["q_proj"], "r": 512}) == []
    assert "rank 513: vLLM takes at most 512; merge instead" in reasons({"rank_pattern": {"q_proj": 513}})[0]
    assert "no LoRA on embeddings" in reasons({"target_modules": ["embed_tokens"]})[0]
    assert "no LoRA on gpt2 models" in reasons({}, FAMILIES["gpt2"])[0]
    assert "whole trained modules" in reasons({"modules_to_save": ["lm_head"]})[0]
    assert "DoRA" in reasons({"use_dora": True})[0]
    assert "trains the biases" in reasons({"bias": "lora_only"})[0]
    assert "letters, digits" in reasons({}, name="my model")[0]


def test_an_adapted_head_is_refused_when_the_tensors_show_it(tmp_path):
    base, adapter = make_adapter(tmp_path, FAMILIES["llama"], target_modules=["lm_head", "q_proj"])
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="lm_head: vLLM takes no LoRA on embeddings, and on few heads; merge instead"):
        VLLM.write(Order(adapter, BaseSpec(str(base)), tmp_path / "out", tmp_path / "out"))


def test_what_differs_from_training_is_said():
    def notes(**spec):
        return " ".join(vllm._base_notes(BaseSpec("base", **spec)))

    assert notes(dtype="bfloat16") == ""
    assert "vLLM computes LoRA in 16 bits" in notes()
    nf4 = notes(quantization="nf4", double_quant=True, dtype="bfloat16")
    assert "served on the full-precision one" in nf4
    assert "vLLM makes NF4 of the base while loading; it takes" in nf4
    assert "which the training did not have" in notes(quantization="nf4", dtype="bfloat16")
    assert "bitsandbytes" not in notes(quantization="int8", dtype="bfloat16")
