"""RMSNorm layers are swapped where values and gradients were proven to be the same, and hold less."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from lora_sft.kernels.norm import Kind, rms_norm, swap_norms
from lora_sft.kernels.swap import Swaps

KINDS = {LlamaRMSNorm: Kind(0.0, True), Olmo2RMSNorm: Kind(0.0, False), GemmaRMSNorm: Kind(1.0, False)}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}


def layer(sort, width: int, dtype=torch.float32, trained: bool = True):
    """A layer with a weight that is not what it starts with."""
    made = sort(width).to(dtype)
    made.weight.data = (torch.randn(width) / 4 + (0 if sort is GemmaRMSNorm else 1)).to(dtype)
    return made.requires_grad_(trained)


def epsilon(made) -> float:
    return getattr(made, "variance_epsilon", None) or made.eps


def results(function, *leaves, towards):
    """Values and gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    found = function(*leaves)
    return [found, *torch.autograd.grad(found, leaves, towards.to(found.dtype))]


def apart(found, truth) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("aligned", [False, True], ids=["any gradient", "a gradient along the output"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sort", KINDS)
def test_it_is_as_near_to_float64_as_the_layer_itself(sort, dtype, aligned):
    torch.manual_seed(0)
    made, kind = layer(sort, 96, dtype), KINDS[sort]
    inputs = (3 * torch.randn(5, 40, 96)).to(dtype)

    def plain(x, w):
        return (w + kind.offset) * x / (x.square().mean(-1, keepdim=True) + epsilon(made)).sqrt()

    towards = torch.randn(5, 40, 96, dtype=torch.float64)
    if aligned:
        towards = towards / 8 + made(inputs).detach().double()
    towards = towards.to(dtype)
    weight = made.weight.detach()
    exact = results(plain, inputs.double(), weight.double(), towards=towards)
    own = results(lambda x, w: torch.func.functional_call(made, {"weight": w}, x), inputs, weight, towards=towards)
    ours = results(lambda x, w: rms_norm(x, w, epsilon(made), kind), inputs, weight, towards=towards)
    frozen = results(lambda x: rms_norm(x, weight, epsilon(made), kind), inputs, towards=towards)
    assert [a.dtype for a in ours] == [b.dtype for b in own]
    for a, b, c in [*zip(ours, own, exact, strict=True), *zip(frozen, own[:2], exact[:2], strict=True)]:
        assert apart(a, c) <= max(1.5 * apart(b, c), torch.finfo(b.dtype).eps / 8)


@pytest.mark.parametrize("rows", [(0,), (1,), (3, 1, 2), (700,)], ids=str)
def test_rows_of_any_number_in_any_order_in_memory(rows):
    made = layer(LlamaRMSNorm, 512, trained=False)
    turned = torch.randn(512, *rows).permute(*range(1, len(rows) + 1), 0)
    towards = torch.randn(512, *rows).permute(*range(1, len(rows) + 1), 0)
    own = results(made, turned, towards=towards)
    ours = results(lambda x: rms_norm(x, made.weight, epsilon(made)), turned, towards=towards)
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_weight_of_zero_does_not_spoil_the_gradient():
    made = layer(LlamaRMSNorm, 32, trained=False)
    made.weight.data[::3] = 0
    inputs, towards = torch.randn(9, 32), torch.randn(9, 32)
    own = results(made, inputs, towards=towards)
    ours = results(lambda x: rms_norm(x, made.weight, epsilon(made)), inputs, towards=towards)
    torch.testing.assert_close(ours[1], own[1], rtol=1e-5, atol=1e-6)


def held(function) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a function gives, and what autograd holds for its gradient beside weights (one-dimensional)."""
    tensors = []
    with saved_tensors_hooks(lambda tensor: tensors.append(tensor), lambda packed: packed):
        found = function()
    return found, [tensor for tensor in tensors if tensor.dim() > 1]


def test_beside_its_output_it_holds_one_number_a_row():
    made = layer(LlamaRMSNorm, 64, torch.bfloat16, trained=False)
    inputs = torch.randn(11, 64, dtype=torch.bfloat16, requires_grad=True)
    found, tensors = held(lambda: rms_norm(inputs, made.weight, epsilon(made)))
    assert [tensor.shape for tensor in tensors if tensor.data_ptr() != found.data_ptr()] == [(11, 1)]


@pytest.mark.parametrize("sort", [LlamaRMSNorm, GemmaRMSNorm])
def test_otherwise_its_input_and_one_number_a_row(sort):
    made = layer(sort, 64, torch.bfloat16, trained=sort is LlamaRMSNorm)
    inputs = torch.randn(11, 64, dtype=torch.bfloat16, requires_grad=True)
    _, tensors = held(lambda: rms_norm(inputs, made.weight, epsilon(made), KINDS[sort]))
    assert [tensor.shape for tensor in tensors if tensor.data_ptr() != inputs.data_ptr()] == [(11, 1)]


def test_without_gradients_nothing_is_held():
    inputs = torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        found, tensors = held(lambda: rms_norm(inputs, torch.ones(8), 1e-6))
    assert not found.requires_grad
    assert not tensors


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("sort", KINDS)
def test_the_output_has_the_dtype_that_the_layer_gives(sort, autocast, inputs, weight):
    made = layer(sort, 16, weight)
    x = torch.randn(4, 16, dtype=inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own = made(x)
        with Swaps() as swaps:
            assert swap_norms(made, swaps).engaged == 1
            assert made(x).dtype == own.dtype


def model_of(config, dtype=torch.float32):
    """A tiny random model whose norms have weights of their own, with an adapter on every layer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.weight.data += torch.randn(module.weight.shape).to(dtype) / 4
    made = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), autocast_adapter_dtype=False)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return made.train()


def learned(model) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch."""
    torch.manual_seed(1)
    tokens = torch.randint(1, 64, (2, 12))
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


FAMILIES = {
    "llama": (LlamaConfig(**SHAPE), 5),
    "qwen3": (Qwen3Config(**SHAPE), 9),
    "gemma3": (Gemma3TextConfig(**SHAPE), 13),
    "olmo2": (Olmo2Config(**SHAPE), 9),
    "phi3": (Phi3Config(**SHAPE), 5),
    "gpt-oss": (GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1), 5),
}


@pytest.mark.parametrize(("config", "norms"), FAMILIES.values(), ids=FAMILIES)
def test_every_norm_of_a_model_is_swapped_and_it_learns_the_same(config, norms):
    model = model_of(config)
    loss, gradients = learned(model)
    with Swaps() as swaps:
        part = swap_norms(model, swaps)
        found, others = learned(model)
    assert str(part) == f"RMSNorm ×{norms}"
    assert found == pytest.approx(loss, rel=1e-6)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_is_the_same_under_checkpointing(reentrant):
    made = layer(LlamaRMSNorm, 16)
    inputs, towards = torch.randn(4, 16), torch.randn(4, 16)
    own = results(made, inputs, towards=towards)
    with Swaps() as swaps:
        swap_norms(made, swaps)
        x = inputs.clone().requires_grad_()
        made.zero_grad()
        checkpoint(made, x, use_reentrant=reentrant).backward(towards)
    torch.testing.assert_close(x.grad, own[1])
    assert made.weight.grad is not None


class CentredRMSNorm(LlamaRMSNorm):
    """Takes the mean away first."""

    def forward(self, inputs):
        return super().forward(inputs - inputs.mean(-1, keepdim=True))


class AddedRMSNorm(LlamaRMSNorm):
    """Adds its ε to the root instead of the square."""

    def forward(self, inputs):
        return self.weight * inputs / (inputs.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class BackwardsRMSNorm(LlamaRMSNorm):
    """The right values; the gradient of the root is missing."""

    def forward(self, inputs):
        square = inputs.detach().square().mean(-1, keepdim=True)
        return self.weight * inputs * (square + self.variance_epsilon).rsqrt()


class GatedRMSNorm(LlamaRMSNorm):
    """Wants more than its inputs."""

    def forward(self, inputs, gate):
        return super().forward(inputs) * gate


@pytest.mark.parametrize("sort", [CentredRMSNorm, AddedRMSNorm, BackwardsRMSNorm, GatedRMSNorm])
def test_what_only_looks_like_one_keeps_its_own_forward(sort):
    made = sort(16)
    with Swaps() as swaps:
        part = swap_norms(made, swaps)
        assert "forward" not in vars(made)
    assert str(part) == f"RMSNorm ×0 ({sort.__name__} computes something else)"


def test_a_forward_that_somebody_replaced_stays():
    made = LlamaRMSNorm(16)
    made.forward = lambda inputs: inputs
    with Swaps() as swaps:
        assert swap_norms(made, swaps) == ("RMSNorm", 0, "LlamaRMSNorm stays as it is")
    assert made(3) == 3


def test_layers_of_one_class_with_another_epsilon_are_told_apart():
    pair = nn.ModuleList([LlamaRMSNorm(16, 1e-6), LlamaRMSNorm(16, 1e-2)])
    x = torch.randn(3, 16) / 10
    own = [made(x) for made in pair]
    with Swaps() as swaps:
        assert swap_norms(pair, swaps).engaged == 2
        for made, values in zip(pair, own, strict=True):
            torch.testing.assert_close(made(x), values)


def test_a_proof_runs_no_hooks_and_takes_no_random_numbers():
    made, calls = LlamaRMSNorm(16), []
    made.register_forward_hook(lambda *_: calls.append(1))
    state = torch.random.get_rng_state()
    with Swaps() as swaps:
        assert swap_norms(made, swaps).engaged == 1
        assert not calls
        assert torch.equal(torch.random.get_rng_state(), state)
        made(torch.randn(2, 16))
    assert calls == [1]


def test_a_dtype_that_was_not_proven_goes_to_the_layers_own():
    made = layer(LlamaRMSNorm, 16)
    x = torch.randn(3, 16, dtype=torch.float64)
    own = made(x)
    with Swaps() as swaps:
        assert swap_norms(made, swaps).engaged == 1
        assert torch.equal(made(x), own)
