"""A LoRA layer in one function against PEFT's own, gradients by autograd."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_sft.kernels.projection import lora_projection, swap_projections
from lora_sft.kernels.swap import Swaps
from lora_sft.model.base import keep_weights_unpacked
from lora_sft.model.tiny import save_tiny, tiny_model
from tests.families import tiny

IDS = torch.arange(20).view(2, 10) + 5


def adapted(model=None, **settings):
    """A model with an adapter whose B is not zero."""
    model = tiny_model(100) if model is None else model
    given = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(model, LoraConfig(**given))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def step(model, autocast=None):
    """Logits, and the gradient of every trained parameter."""
    torch.manual_seed(0)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach().float(), gradients


def apart(one, other):
    return float((one - other).norm() / other.norm())


def held_against_itself(model, autocast=None):
    """(modules engaged, distance of the logits, largest distance of a gradient) between plain and swapped."""
    logits, gradients = step(model, autocast)
    with Swaps() as swaps:
        part = swap_projections(model, swaps)
        ours, our_gradients = step(model, autocast)
    assert ours.dtype == logits.dtype
    assert our_gradients.keys() == gradients.keys()
    assert all(one.dtype == other.dtype for one, other in zip(our_gradients.values(), gradients.values(), strict=True))
    again, _ = step(model, autocast)
    assert torch.equal(again, logits)  # put back
    return part, apart(ours, logits), max(apart(our_gradients[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (2, 7, 24), (2, 3, 7, 24)], ids=str)
def test_the_gradients_are_those_of_autograd(shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    inputs, weight, bias, a, b = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (shape, (40, 24), (40,), (4, 24), (40, 4))
    )
    found = []
    for ours in (True, False):
        leaves = [one.clone().requires_grad_() for one in (inputs, a, b)]
        x, down, up = leaves
        if ours:
            outputs = lora_projection(x, lambda: weight, bias if with_bias else None, down, up, 3.0)
        else:
            outputs = x @ weight.t() + (bias if with_bias else 0) + 3.0 * (x @ down.t()) @ up.t()
        outputs.square().sum().backward()
        found.append([outputs.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_an_input_that_needs_no_gradient_gets_none_and_the_weight_is_asked_for_once():
    asked = []
    weight = torch.randn(6, 5)
    a, b = torch.randn(2, 5, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    lora_projection(torch.randn(3, 5), lambda: asked.append(1) or weight, None, a, b, 1.0).sum().backward()
    assert len(asked) == 1
    assert a.grad is not None
    assert b.grad is not None


SETTINGS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    "embeddings too": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_in_float32_it_is_peft_s_layer_up_to_rounding(settings):
    part, logits, gradients = held_against_itself(adapted(**settings))
    assert part.engaged == (2 if "target_modules" in settings else 14)
    assert logits < 1e-6
    assert gradients < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gemma", "phi", "stablelm", "olmo"])
def test_it_is_for_any_family(family):
    part, logits, gradients = held_against_itself(adapted(tiny(family, {})))
    assert part.engaged > 0
    assert logits < 1e-5
    assert gradients < 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), ["a few words"] * 5, 300)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_on_a_quantized_base(folder, kind, double, dtype, rounding):
    method = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=method, dtype=dtype, device_map="cpu")
    keep_weights_unpacked(model)
    model = adapted(model)
    part, logits, gradients = held_against_itself(model, None if dtype == torch.float32 else dtype)
    assert part.engaged == 14
    assert logits < rounding
    assert gradients < rounding


OTHERS = {
    "dropout": ({"lora_dropout": 0.5}, "adapters with dropout stay as they are"),
    "DoRA": ({"use_dora": True}, "DoraLinear stays as it is"),
}


@pytest.mark.parametrize(("settings", "left"), OTHERS.values(), ids=OTHERS)
def test_what_it_is_not_made_for_is_left_alone_and_said(settings, left):
    with Swaps() as swaps:
        part = swap_projections(adapted(**settings), swaps)
    assert (part.engaged, part.left) == (0, left)


def test_a_layer_whose_bias_is_trained_is_left_alone():
    model = adapted(tiny("qwen2", {}), bias="all")
    with Swaps() as swaps:
        part = swap_projections(model, swaps)
    assert part.engaged == 8  # o_proj, gate_proj, up_proj and down_proj have no bias
    assert part.left == "adapters beside a trained base stay as they are"


def test_a_layer_that_is_no_linear_one_is_left_alone():
    with Swaps() as swaps:
        part = swap_projections(adapted(tiny("gpt2", {}), target_modules=["c_attn"], fan_in_fan_out=True), swaps)
    assert (part.engaged, part.left) == (0, "adapters on Conv1D stay as they are")


def test_a_switched_off_or_merged_adapter_is_off():
    model = adapted()
    with model.disable_adapter():
        base = model(input_ids=IDS).logits.detach()
    with Swaps() as swaps, torch.no_grad():
        swap_projections(model, swaps)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base)
        on = model(input_ids=IDS).logits
        assert not torch.allclose(on, base)
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, on, rtol=1e-4, atol=1e-5)
