"""A LoRA layer in one function against PEFT's own, gradients by autograd."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_sft.kernels import projection
from lora_sft.kernels.projection import Layer, lora_projections, swap_projections
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
            layer = Layer(lambda: weight, bias if with_bias else None, down, up, 3.0)
            (outputs,) = lora_projections(x, [layer])
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
    (outputs,) = lora_projections(torch.randn(3, 5), [Layer(lambda: asked.append(1) or weight, None, a, b, 1.0)])
    outputs.sum().backward()
    assert len(asked) == 1
    assert a.grad is not None
    assert b.grad is not None


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,)], ids=str)
def test_layers_together_are_each_alone(used):
    """Of other ranks, scalings and sizes; some of the outputs may not be used."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 7, 24, generator=generator, dtype=torch.float64)
    sizes = [(40, 4), (12, 2), (12, 5)]
    matrices = [
        [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((out, 24), (rank, 24), (out, rank))]
        for out, rank in sizes
    ]
    found = []
    for together in (True, False):
        x = inputs.clone().requires_grad_()
        leaves = [[a.clone().requires_grad_(), b.clone().requires_grad_()] for _, a, b in matrices]
        layers = [
            Layer(lambda weight=weight: weight, None, a, b, 1.0 + number)
            for number, ((weight, _, _), (a, b)) in enumerate(zip(matrices, leaves, strict=True))
        ]
        outputs = lora_projections(x, layers) if together else [lora_projections(x, [one])[0] for one in layers]
        sum(outputs[number].square().sum() for number in used).backward()
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for pair in leaves for one in pair]
        found.append([*(one.detach() for one in outputs), x.grad, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_layers_that_are_given_one_tensor_are_computed_together(monkeypatch):
    sizes, real = [], lora_projections
    monkeypatch.setattr(projection, "lora_projections", lambda x, layers: sizes.append(len(layers)) or real(x, layers))
    model = adapted()
    with Swaps() as swaps:
        swap_projections(model, swaps)
        step(model)
    assert sizes == [3, 1, 2, 1] * 2  # q, k, v; o; gate, up; down


def test_experts_get_tensors_of_their_own(monkeypatch):
    """Layers that are called with several tensors, or not at all, are each computed alone."""

    class Parallel(torch.nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, inputs):
            return self.first(inputs) + self.second(inputs * 2) + self.first(inputs * 3)

    model = adapted()
    layer = model.base_model.model.model.layers[0]
    layer.mlp = Parallel(layer.mlp.gate_proj, layer.mlp.up_proj)
    monkeypatch.setattr(layer, "forward", lambda hidden_states, **_: layer.mlp(hidden_states)[..., :64])
    part, logits, gradients = held_against_itself(model)
    assert part.engaged == 13  # one was left out of the model
    assert logits < 1e-6
    assert gradients < 1e-5


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
