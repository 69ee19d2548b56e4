"""The fast parts together: what they are held against, and what happens when one of them is wrong."""

import math

import pytest
import torch
from peft import LoraConfig

from lora_sft import finetune
from lora_sft.chat import IGNORED
from lora_sft.chat.labels import Example
from lora_sft.kernels import projection
from lora_sft.kernels.swap import Part, Swaps
from lora_sft.model.adapter import attach
from lora_sft.model.tiny import tiny_model
from lora_sft.training import fast
from lora_sft.training.batching import Batching
from lora_sft.training.fast import ROWS, TOKENS, Distance, Measured, compare, quicken
from lora_sft.training.isolation import settle
from tests.conftest import FEW, logged, sums
from tests.families import tiny

BATCHING = Batching(micro_batch=2, max_length=64)
EXAMPLES = [
    Example(
        [5 + (n * i) % 90 for i in range(20 + 7 * n)], [IGNORED] * 9 + [5 + (n * i) % 90 for i in range(9, 20 + 7 * n)]
    )
    for n in range(1, 4)
]


def adapted(model=None, **settings):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    return attach(tiny_model(100) if model is None else model, LoraConfig(**settings), seed=0)


def quickened(model, swaps):
    return quicken(model, EXAMPLES, 0, lambda: settle(BATCHING, model), swaps, None)


def forwards(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


ADAPTERS = {"gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "qwen3_moe": {"target_modules": ["q_proj"]}}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "cohere", "phi3", *ADAPTERS])
def test_the_whole_is_proven_for_each_family(family, capfd):
    model = adapted(tiny(family, {}), **ADAPTERS.get(family, {}))
    with Swaps() as swaps:
        quickened(model, swaps)
        assert forwards(model)
    assert not forwards(model)
    words = capfd.readouterr().err
    assert "the plain model's step differs by" in words
    assert "loss without logits ×1" in words


def test_the_model_is_left_as_it_was(capfd):
    model = adapted()
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    model.train()
    before = torch.get_rng_state()
    with Swaps() as swaps:
        batching = quickened(model, swaps).batching
    assert batching.one_row
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def a_projection_that_forgets(what):
    """Planted mistakes: each is one line that is easily written."""
    real = projection.lora_projections

    def wrong(inputs, layers):
        if what == "the scaling":
            return real(inputs, [layer._replace(scaling=1.0) for layer in layers])
        if what == "a tenth of the scaling":
            return real(inputs, [layer._replace(scaling=0.9 * layer.scaling) for layer in layers])
        if what == "the gradient at A":
            return real(inputs, [layer._replace(a=layer.a.detach()) for layer in layers])
        return real(inputs.detach(), layers)

    return wrong


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mistake", ["the scaling", "a tenth of the scaling", "the gradient at A", "the gradient at its input"]
)
def test_a_wrong_part_is_found_and_all_are_taken_out(mistake, autocast, monkeypatch, capfd):
    monkeypatch.setattr(projection, "lora_projections", a_projection_that_forgets(mistake))
    model = adapted()
    with Swaps() as swaps:
        batching = quicken(model, EXAMPLES, 0, lambda: settle(BATCHING, model), swaps, autocast).batching
        assert not forwards(model)
    assert not batching.one_row  # without attention by document, rows are padded
    assert "the fast parts are off: a step with them differs" in capfd.readouterr().err


def test_attention_that_sees_the_neighbour_is_not_used(monkeypatch, capfd):
    """The proof of isolation stands before that of the loss: rows are padded then, and the rest may stay."""

    def leaking(query, key, value, sizes, dropout, scaling):
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return found.transpose(1, 2)

    monkeypatch.setattr("lora_sft.kernels.attention._one_after_another", leaking)
    model = adapted()
    with Swaps() as swaps:
        assert not quickened(model, swaps).batching.one_row
        assert forwards(model)


def test_what_could_not_be_used_is_named(capfd):
    model = adapted(lora_dropout=0.1)
    with Swaps() as swaps:
        quickened(model, swaps)
    words = capfd.readouterr().err
    assert "left as they are: LoRA projections: adapters with dropout stay as they are" in words


def test_the_rows_of_the_proof_hold_supervised_tokens_and_are_short():
    late = Example(list(range(1000)), [IGNORED] * 900 + list(range(900, 1000)))
    short = fast.shortened(late, TOKENS)
    assert len(short.input_ids) == TOKENS == len(short.labels)
    assert short.labels[TOKENS // 2] == 900
    assert fast.shortened(EXAMPLES[0], TOKENS) == EXAMPLES[0]
    assert ROWS * TOKENS <= 128


def test_a_gradient_that_is_missing_or_no_number_is_no_rounding():
    gradients = {"a": torch.ones(2), "b": torch.ones(3)}
    plain = Measured(1.0, gradients)
    assert compare(plain, Measured(1.0, gradients)) == Distance(0.0, 0.0)
    assert compare(plain, Measured(1.0, {"a": torch.ones(2)})) == Distance(math.inf, math.inf)
    assert compare(plain, Measured(1.0, gradients | {"b": torch.tensor([1, 1, math.nan])})).loss == math.inf
    assert not Distance(0.0, math.inf).is_rounding(torch.float32)
    assert compare(plain, Measured(1.1, gradients)).loss == pytest.approx(0.1)


def test_a_run_is_the_same_with_them_and_without(base, tmp_path):
    runs = {
        fast: finetune(base, sums(12), output_dir=tmp_path / str(fast), **FEW | {"fast_kernels": fast, "max_steps": 6})
        for fast in (True, False)
    }
    losses = {fast: [line["loss"] for line in logged(run.output_dir) if "loss" in line] for fast, run in runs.items()}
    assert len(losses[True]) == 6
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert runs[True].metrics["train_loss"] == pytest.approx(runs[False].metrics["train_loss"], rel=1e-5)
    entropies = [line.get("entropy") for line in logged(runs[True].output_dir) if "loss" in line]
    assert all(0 < entropy <= math.log(512) for entropy in entropies)
    assert all("entropy" not in line for line in logged(runs[False].output_dir))
    assert forwards(runs[True].model) == forwards(runs[False].model) == ["base_model.model"]  # that one is TRL's


def test_a_further_part_is_one_line(monkeypatch, capfd):
    seen = []
    monkeypatch.setattr(fast, "PARTS", (lambda model, swaps: seen.append(model) or Part("something new", 3),))
    model = adapted()
    with Swaps() as swaps:
        quickened(model, swaps)
    assert seen == [model]
    assert "something new ×3" in capfd.readouterr().err


def test_label_smoothing_is_that_of_torch(base, tmp_path):
    """With the fast parts and without; the loss that is logged has no smoothing in it."""
    runs = [
        finetune(
            base,
            sums(6),
            output_dir=tmp_path / str(fast),
            **FEW | {"fast_kernels": fast, "max_steps": 3, "label_smoothing": 0.2},
        )
        for fast in (True, False)
    ]
    plain = finetune(base, sums(6), output_dir=tmp_path / "plain", **FEW | {"max_steps": 3})
    first, second, without = (
        [line["loss"] for line in logged(run.output_dir) if "loss" in line] for run in (*runs, plain)
    )
    assert first == pytest.approx(second, rel=1e-5)
    assert first[0] == pytest.approx(without[0], rel=1e-6)
    assert abs(first[-1] - without[-1]) > 1e-4
