"""The loss without logits against the plain one, in float64 where rounding is the question."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lora_sft.kernels import head as kernels
from lora_sft.kernels.head import PROBE, Shaping, Sums, linear_cross_entropy, shaping_of, swap_head, tap_of
from lora_sft.kernels.swap import Swaps
from lora_sft.model.tiny import tiny_model
from tests.families import tiny

TOKENS, WIDTH, VOCABULARY = 37, 16, 203
SHAPINGS = {"plain": Shaping(), "scaled": Shaping(0.25), "capped": Shaping(1.0, 5.0), "both": Shaping(2.0, 3.0)}


def plain(hidden, weight, targets, bias, shaping, label_smoothing) -> Sums:
    """By way of all logits at once, with the gradient by autograd."""
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    logits = (logits.double() if logits.dtype == torch.float64 else logits.float()) * shaping.scale
    if shaping.softcap:
        logits = torch.tanh(logits / shaping.softcap) * shaping.softcap
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    nll = F.cross_entropy(logits, targets, reduction="sum")
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    return Sums(loss, nll, entropy, (logits.argmax(-1) == targets).sum())


def inputs(dtype, with_bias=True, tokens=TOKENS):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(tokens, WIDTH, generator=generator),
        torch.randn(VOCABULARY, WIDTH, generator=generator),
    )
    bias = torch.randn(VOCABULARY, generator=generator) if with_bias else None
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    of_it = [None if value is None else value.to(dtype).requires_grad_() for value in (hidden, weight, bias)]
    return of_it[0], of_it[1], targets, of_it[2]


def run(function, dtype, shaping=SHAPINGS["plain"], label_smoothing=0.0, with_bias=True):
    hidden, weight, targets, bias = inputs(dtype, with_bias)
    sums = function(hidden, weight, targets, bias, shaping, label_smoothing)
    (sums.loss / 7).backward()
    return Sums(*(one.detach() for one in sums)), [
        value.grad.double() for value in (hidden, weight, bias) if value is not None
    ]


def apart(found, expected):
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))


@pytest.fixture(params=["one tile", "tiles of 5 tokens", "blocks of 2 tokens"])
def tiles(request, monkeypatch):
    if request.param != "one tile":
        monkeypatch.setitem(kernels.TILE_BYTES, "cpu", 5 * VOCABULARY * 4)
    if request.param == "blocks of 2 tokens":
        monkeypatch.setattr(kernels, "BLOCK_BYTES", 2 * VOCABULARY * 4)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shaping", SHAPINGS.values(), ids=SHAPINGS)
def test_loss_and_gradients_are_those_of_the_plain_loss(tiles, shaping, label_smoothing):
    found, gradients = run(linear_cross_entropy, torch.float32, shaping, label_smoothing)
    expected, plain_gradients = run(plain, torch.float32, shaping, label_smoothing)
    for one, other in zip(found, expected, strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-6)
    assert apart(gradients, plain_gradients) < 1e-6


@pytest.mark.parametrize("shaping", SHAPINGS.values(), ids=SHAPINGS)
def test_in_bfloat16_it_is_as_near_to_float64_as_the_plain_loss_is(tiles, shaping):
    exact, exact_gradients = run(plain, torch.float64, shaping)
    ours, our_gradients = run(linear_cross_entropy, torch.bfloat16, shaping)
    theirs, their_gradients = run(plain, torch.bfloat16, shaping)
    # Both sides round their inputs alike; that rounding is in both distances.
    assert abs(float(ours.loss - exact.loss)) <= 1.2 * abs(float(theirs.loss - exact.loss)) + 1e-3 * float(exact.loss)
    assert apart(our_gradients, exact_gradients) <= 1.2 * apart(their_gradients, exact_gradients)


def test_the_gradient_is_the_slope(tiles):
    """By finite differences, which know nothing of either formula. Float64 goes through float32 sums: 1e-3."""
    hidden, weight, targets, bias = (None if v is None else v.detach() for v in inputs(torch.float32))
    hidden.requires_grad_()
    shaping = SHAPINGS["both"]
    linear_cross_entropy(hidden, weight, targets, bias, shaping, 0.1).loss.backward()
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    ends = [
        plain(hidden.double() + step * direction.double(), weight.double(), targets, bias.double(), shaping, 0.1).loss
        for step in (1e-4, -1e-4)
    ]
    assert float((hidden.grad * direction).sum()) == pytest.approx(
        float(ends[0].detach() - ends[1].detach()) / 2e-4, rel=1e-3
    )


def test_a_frozen_output_layer_gets_no_gradient_and_needs_none_kept():
    hidden, weight, targets, _ = inputs(torch.float32, with_bias=False)
    weight.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        linear_cross_entropy(hidden, weight, targets).loss.backward()
    assert weight.grad is None
    assert sum(kept) == hidden.numel()  # the gradient at the hidden states, and no logits


def test_no_supervised_token_at_all_is_a_loss_of_zero():
    hidden, weight, targets, bias = inputs(torch.float32, tokens=0)
    sums = linear_cross_entropy(hidden, weight, targets, bias)
    sums.loss.backward()
    assert [one.item() for one in sums] == [0, 0, 0, 0]
    assert hidden.grad.shape == (0, WIDTH)


def test_under_autocast_it_computes_in_16_bits_as_a_linear_layer_does():
    hidden, weight, targets, bias = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets, bias).loss
    assert found.dtype == torch.float32
    cast = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, bias.bfloat16()).loss
    assert found.item() == cast.item()


def test_wrong_shapes_are_refused():
    hidden, weight, targets, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"37 tokens, targets are \(36,\)"):
        linear_cross_entropy(hidden, weight, targets[:-1])


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {}, Shaping()),
        ("gemma2", {"final_logit_softcapping": 7.0}, Shaping(1.0, 7.0)),
        ("cohere", {"logit_scale": 0.0625}, Shaping(0.0625)),
        ("granite", {"logits_scaling": 8.0}, Shaping(0.125)),
    ],
)
def test_what_a_model_does_to_its_logits_is_found_out(family, fields, expected):
    model = tiny(family, fields)
    found = shaping_of(model, model.get_output_embeddings())
    assert found is not None
    assert found.scale == pytest.approx(expected.scale)
    assert found.softcap == expected.softcap


def test_what_nobody_knows_is_left_alone():
    model = tiny_model(100)
    forward = model.forward

    def squared(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.square()
        return output

    with Swaps() as swaps:
        swaps.forward(model, squared)
        part = swap_head(model, swaps)
    assert (part.engaged, part.left) == (0, "what this model does to its logits is not known")
    assert len(set(PROBE)) == len(PROBE)


def test_beside_its_listening_the_model_gives_its_logits_as_ever():
    model, ids = tiny_model(100), torch.arange(6)[None]
    before = model(input_ids=ids).logits
    with Swaps() as swaps:
        assert swap_head(model, swaps).engaged == 1
        assert torch.equal(model(input_ids=ids).logits, before)
        with tap_of(model).listening() as caught:
            assert model(input_ids=ids).logits.shape == (1, 6, 1)
        assert torch.equal(caught[0] @ model.lm_head.weight.t(), before)
    assert tap_of(model) is None
    assert "forward" not in vars(model.lm_head)
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(model.config)])
