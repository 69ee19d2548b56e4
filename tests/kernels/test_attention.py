"""Documents in one row against each of them alone, and against transformers' own mask for such rows."""

from contextlib import nullcontext

import pytest
import torch

from lora_sft.chat.labels import Example
from lora_sft.kernels import attention as kernels
from lora_sft.kernels.attention import attention_by_document, documents, swap_attention, takes_documents
from lora_sft.kernels.swap import Swaps
from lora_sft.model.tiny import tiny_model
from lora_sft.training.batching import lay_end_to_end
from tests.families import tiny

SIZES = (5, 11, 3)
DOCUMENTS = [Example([7 + n * 13 + i for i in range(size)], [1] * size) for n, size in enumerate(SIZES)]
ROW = lay_end_to_end(DOCUMENTS)


def step(model, longest=max(SIZES)):
    """Logits of the row (tokens, vocabulary), and the gradients of all weights."""
    inputs = {name: value for name, value in ROW.items() if name not in ("labels", "seq_idx")}
    with documents(longest):
        logits = model(**inputs, use_cache=False).logits[0]
    logits.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


@pytest.fixture
def calls(monkeypatch):
    """The sizes of the documents that were computed one after another."""
    seen, real = [], kernels._one_after_another
    monkeypatch.setattr(kernels, "_one_after_another", lambda *args: seen.append(tuple(args[3])) or real(*args))
    return seen


FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {},
    "phi3": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_documents_is_computed_as_by_transformers_own_mask(family, calls):
    model = tiny(family, FAMILIES[family])
    logits, gradients = step(model)
    assert not calls
    with Swaps() as swaps:
        assert swap_attention(model, swaps).engaged == 1
        ours, our_gradients = step(model)
        assert calls == [SIZES, SIZES]  # both layers, without a mask
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-6)
    assert not takes_documents(model)


def test_every_document_is_as_if_alone(calls):
    model = tiny("llama", {})
    with Swaps() as swaps:
        swap_attention(model, swaps)
        together, _ = step(model)
        for one, document in zip(together.split(SIZES), DOCUMENTS, strict=True):
            alone = model(input_ids=torch.tensor([document.input_ids])).logits[0].detach()
            torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-5)
    assert calls


def test_a_window_shorter_than_a_document_keeps_its_mask(calls):
    """One layer looks 4 tokens back: it is computed under its mask, the other by document."""
    model = tiny("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]})
    logits, _ = step(model)
    with Swaps() as swaps:
        swap_attention(model, swaps)
        ours, _ = step(model)
    assert calls == [SIZES]
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)


def test_padded_batches_and_replies_token_by_token_are_as_ever(calls):
    model, ids = tiny("llama", {}), torch.arange(12).view(2, 6) + 3
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])}
    with torch.no_grad():
        before = model(**padded).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
        with Swaps() as swaps:
            swap_attention(model, swaps)
            after = model(**padded).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    assert not calls


def test_it_goes_on_in_recomputed_layers(calls):
    """Checkpointing runs a layer again in the backward pass, when nobody says any more where documents end."""
    model = tiny("llama", {})
    _, gradients = step(model)
    model.train()
    # transformers 5.23 renamed it and warns at the old name.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    with Swaps() as swaps:
        swap_attention(model, swaps)
        _, ours = step(model)
    assert calls == [SIZES] * 4
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_model_with_another_attention_keeps_it():
    model = tiny("llama", {}, attn_implementation="eager")
    with Swaps() as swaps:
        part = swap_attention(model, swaps)
    assert (part.engaged, part.left) == (0, "this model computes its attention with eager")


@pytest.mark.parametrize("context", [nullcontext(), documents(None)], ids=["unsaid", "said to be none"])
def test_without_documents_it_is_sdpa(context):
    layer = tiny_model(100).model.layers[0].self_attn
    query, key, value = torch.randn(3, 1, 4, 6, 16).unbind()
    with context:
        found, _ = attention_by_document(layer, query, key[:, :2], value[:, :2], None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key[:, :2], value[:, :2], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))
