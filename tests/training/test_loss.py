"""The loss is the mean over supervised tokens, computed where they are and nowhere else."""

import pytest
import torch

from lora_sft.model.tiny import tiny_model
from lora_sft.training.loss import forward_loss, next_token_loss, supervised_positions


def random_batch(rows: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (rows, length), generator=generator)
    labels = torch.where(torch.rand(rows, length, generator=generator) < 0.3, ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_the_loss_and_its_gradients_are_those_of_transformers():
    batch = random_batch()
    model = tiny_model(100)
    theirs = model(**batch).loss
    theirs.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    ours, _ = forward_loss(model, batch)
    ours.value.backward()
    torch.testing.assert_close(ours.value, theirs, rtol=1e-6, atol=0)
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)


def test_sums_are_counted_by_hand():
    logits = torch.tensor([[[4.0, 0.0], [0.0, 4.0], [0.0, 0.0]]])
    targets = torch.tensor([[0, 0, -100]])
    wrong, right = torch.log(1 + torch.exp(torch.tensor(4.0))), torch.log(1 + torch.exp(torch.tensor(-4.0)))
    torch.testing.assert_close(next_token_loss(logits, targets, 2), (wrong + right) / 2)


def test_the_count_of_the_whole_step_divides_the_loss():
    batch = random_batch()
    model = tiny_model(100)
    alone, _ = forward_loss(model, batch)
    shared, _ = forward_loss(model, batch, token_count=100)
    torch.testing.assert_close(shared.value * 100, alone.value * alone.tokens)
    torch.testing.assert_close(shared.nll, alone.nll)


def test_logits_are_computed_at_supervised_positions_only():
    labels = torch.full((2, 6), -100)
    labels[0, 3] = labels[1, 5] = 7
    assert supervised_positions(labels).tolist() == [2, 4]
    batch = {"input_ids": torch.ones_like(labels), "attention_mask": torch.ones_like(labels), "labels": labels}
    _, output = forward_loss(tiny_model(100), batch)
    assert output.logits.shape == (2, 2, 100)


def test_a_batch_without_supervised_tokens_has_a_loss_of_zero():
    batch = random_batch() | {"labels": torch.full((3, 12), -100)}
    loss, _ = forward_loss(tiny_model(100), batch)
    assert (loss.value.item(), loss.tokens.item(), loss.correct.item()) == (0.0, 0, 0)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="must agree"):
        next_token_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), 1)
