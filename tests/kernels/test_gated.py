"""Gated MLPs are swapped where values and gradients were proven to be the same, and hold gate and up only."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3nTextConfig, GemmaConfig, GlmConfig, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from lora_sft.kernels.gated import GELU, GELU_TANH, SILU, gated_product, swap_gated
from lora_sft.kernels.swap import Swaps
from tests.kernels.test_norm import SHAPE, apart, learned, model_of, results

PLAIN = {SILU: F.silu, GELU: F.gelu, GELU_TANH: lambda x: F.gelu(x, approximate="tanh")}
ACTIVATIONS = pytest.mark.parametrize("activation", PLAIN, ids=lambda one: one.name)


@ACTIVATIONS
def test_the_gradient_is_that_of_differences(activation):
    torch.manual_seed(0)
    gate, up = torch.randn(2, 3, 5, 4, dtype=torch.float64).requires_grad_().unbind()
    both = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda gate, up: gated_product(activation, gate, up), (gate, up))
    assert torch.autograd.gradcheck(lambda both: gated_product(activation, both), (both,))


@ACTIVATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 3), (700,)], ids=str)
def test_it_is_as_near_to_float64_as_the_plain_product(activation, dtype, rows):
    torch.manual_seed(0)
    gate, up, towards = (3 * torch.randn(3, *rows, 400)).to(dtype).unbind()

    def plain(gate, up):
        return PLAIN[activation](gate) * up

    def of_one(gate, up):
        return gated_product(activation, torch.cat([gate, up], -1))

    exact = results(plain, gate.double(), up.double(), towards=towards)
    own = results(plain, gate, up, towards=towards)
    for ours in (lambda *parts: gated_product(activation, *parts), of_one):
        for a, b, c in zip(results(ours, gate, up, towards=towards), own, exact, strict=True):
            assert a.dtype == b.dtype
            assert not rows[0] or apart(a, c) <= max(1.5 * apart(b, c), torch.finfo(dtype).eps / 8)


def adapted(mlp):
    """An MLP with an adapter on every projection."""
    config = LoraConfig(
        r=2, target_modules=["gate_proj", "up_proj", "gate_up_proj", "down_proj"], init_lora_weights=False
    )
    return get_peft_model(mlp, config).base_model.model.train()


MLPS = {
    "two projections": lambda: adapted(LlamaMLP(LlamaConfig(**SHAPE))),
    "one projection": lambda: adapted(Phi3MLP(Phi3Config(**SHAPE))),
}


def products_held(mlp, call=None) -> int:
    """How many of the products that were made in one call live on while its gradient is waited for."""
    seen = []
    hook = mlp.down_proj.register_forward_pre_hook(
        lambda _, given: seen.append(StorageWeakRef(given[0].untyped_storage()))
    )
    found = (call or mlp)(torch.randn(2, 3, 32, requires_grad=True))
    hook.remove()
    alive = sum(not one.expired() for one in seen)
    found.sum().backward()
    return alive


@pytest.mark.parametrize("make", MLPS.values(), ids=MLPS)
def test_the_product_is_not_held_for_the_adapter_behind_it(make):
    mlp = make()
    assert products_held(mlp) == 1
    with Swaps() as swaps:
        assert swap_gated(mlp, swaps).engaged == 1
        assert products_held(mlp) == 0


@pytest.mark.parametrize("make", MLPS.values(), ids=MLPS)
@pytest.mark.parametrize("way", ["plain", "checkpointed", "checkpointed, reentrant", "offloaded"])
def test_values_and_gradients_are_the_same_whatever_is_held(make, way):
    torch.manual_seed(0)
    mlp = make()
    x = torch.randn(2, 3, 32)

    def run():
        mlp.zero_grad()
        inputs = x.clone().requires_grad_()
        if way.startswith("checkpointed"):
            found = checkpoint(mlp, inputs, use_reentrant="reentrant" in way)
        elif way == "offloaded":
            with save_on_cpu():
                found = mlp(inputs)
        else:
            found = mlp(inputs)
        found.square().sum().backward()
        learnt = [one.grad for one in mlp.parameters() if one.requires_grad]
        assert len(learnt) == (6 if hasattr(mlp, "gate_proj") else 4)
        return [found, inputs.grad, *learnt]

    own = run()
    with Swaps() as swaps:
        assert swap_gated(mlp, swaps).engaged == 1
        ours = run()
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b)


def test_below_the_first_adapter_only_the_product_is_held():
    mlp = adapted(LlamaMLP(LlamaConfig(**SHAPE)))
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_("down_proj.lora" in name)
    mlp.down_proj.register_forward_pre_hook(lambda _, given: parts.append(given[0].requires_grad))
    parts: list[bool] = []
    with Swaps() as swaps:
        swap_gated(mlp, swaps)
        found = mlp(torch.randn(2, 32))
    assert parts == [False]
    found.sum().backward()
    assert all(one.grad is not None for name, one in mlp.named_parameters() if "down_proj.lora" in name)


def test_without_gradients_nothing_is_held():
    tensors = []
    parts = torch.randn(2, 3, 8, requires_grad=True)
    with torch.no_grad(), saved_tensors_hooks(lambda tensor: tensors.append(tensor), lambda packed: packed):
        assert not gated_product(SILU, *parts).requires_grad
    assert not tensors


FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "phi3": Phi3Config(**SHAPE),
    "glm": GlmConfig(**SHAPE),
    "gemma": GemmaConfig(**SHAPE),
    "exact gelu": LlamaConfig(**SHAPE, hidden_act="gelu"),
}


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_every_mlp_of_a_model_is_swapped_and_it_learns_the_same(config):
    model = model_of(config)
    loss, gradients = learned(model)
    with Swaps() as swaps:
        part = swap_gated(model, swaps)
        found, others = learned(model)
    assert str(part) == "gated MLP ×2"
    assert found == pytest.approx(loss, rel=1e-6)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())


class Clamped(LlamaMLP):
    """Limits its gate, as some mixtures of experts do."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7.0)) * self.up_proj(x))


class Dropped(LlamaMLP):
    """Drops some of its product in training."""

    def forward(self, x):
        return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 0.1, self.training))


class Normed(LlamaMLP):
    """Has another layer in front of the last projection."""

    def __init__(self, config):
        super().__init__(config)
        self.inner = nn.LayerNorm(config.intermediate_size)

    def forward(self, x):
        return self.down_proj(self.inner(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Swapped(LlamaMLP):
    """Activates the other one."""

    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


LOOKALIKES = [*(sort(LlamaConfig(**SHAPE)).eval() for sort in (Clamped, Dropped, Normed, Swapped))]
LOOKALIKES += [
    LlamaMLP(LlamaConfig(**SHAPE, hidden_act="relu")),
    LlamaMLP(LlamaConfig(**SHAPE, hidden_act="quick_gelu")),
]
SPARSE = {"num_hidden_layers": 1, "intermediate_size": [48], "activation_sparsity_pattern": [0.9]}
LOOKALIKES += [Gemma3nTextMLP(Gemma3nTextConfig(**SHAPE | SPARSE))]


@pytest.mark.parametrize("mlp", LOOKALIKES, ids=lambda mlp: f"{type(mlp).__name__} {mlp.act_fn}")
def test_what_only_looks_like_one_keeps_its_own_forward(mlp):
    with Swaps() as swaps:
        part = swap_gated(mlp, swaps)
        assert "forward" not in vars(mlp)
    assert str(part) == f"gated MLP ×0 ({type(mlp).__name__} computes something else)"


def test_a_proof_leaves_the_model_as_it_was():
    mlp, calls = GemmaMLP(GemmaConfig(**SHAPE)).eval(), []
    mlp.register_forward_hook(lambda *_: calls.append(1))
    before = {name: id(child) for name, child in mlp.named_children()}
    state = torch.random.get_rng_state()
    with Swaps() as swaps:
        assert swap_gated(mlp, swaps).engaged == 1
    assert before == {name: id(child) for name, child in mlp.named_children()}
    assert not mlp.training
    assert not calls
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_output_has_the_dtype_that_the_mlp_gives(autocast):
    mlp = LlamaMLP(LlamaConfig(**SHAPE))
    x = torch.randn(2, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Swaps() as swaps:
        own = mlp(x)
        assert swap_gated(mlp, swaps).engaged == 1
        ours = mlp(x)
    assert ours.dtype == own.dtype
    torch.testing.assert_close(ours, own)
