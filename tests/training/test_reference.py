"""The plain loop agrees: a bare PyTorch training loop and `finetune` give the same losses and the same adapter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from lora_sft import encode, finetune
from lora_sft.training.evaluation import pad
from tests.conftest import logged, sums

STEPS, BATCH, LEARNING_RATE = 20, 4, 2e-3


def plain_loop(model, examples, pad_token_id) -> list[float]:
    """Forward, shift, cross-entropy on the labels, backward, AdamW. The whole of supervised fine-tuning."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = pad([examples[(step * BATCH + row) % len(examples)] for row in range(BATCH)], pad_token_id)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all tensors of an adapter together."""
    assert set(found) == set(expected)
    difference = sum((found[name].double() - expected[name].double()).square().sum() for name in expected).sqrt()
    return (difference / sum(tensor.double().square().sum() for tensor in expected.values()).sqrt()).item()


@pytest.mark.parametrize(("in_4bit", "bound"), [(False, 1e-5), (True, 1e-4)], ids=["float32", "nf4"])
def test_the_plain_loop_agrees(base, tmp_path, in_4bit, bound):
    rows = sums(12)
    run = finetune(
        base,
        rows,
        output_dir=tmp_path / "ours",
        load_in_4bit=in_4bit,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        lr_scheduler_type="constant",
        warmup_ratio=0,
        train_sampling_strategy="sequential",
        lora_r=8,
        lora_alpha=16,
        seed=7,
        save_strategy="no",
        listeners=(),
    )
    ours = [line["loss"] for line in logged(tmp_path / "ours")]

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization if in_4bit else None, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_seed(7)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    ).train()
    theirs = plain_loop(model, [encode(row["messages"], tokenizer) for row in rows], tokenizer.pad_token_id)
    model.save_pretrained(tmp_path / "theirs")

    assert ours == pytest.approx(theirs, rel=bound)
    assert theirs[-1] < 0.8 * theirs[0]
    found = load_file(run.output_dir / "adapter_model.safetensors")
    assert relative_difference(found, load_file(tmp_path / "theirs" / "adapter_model.safetensors")) <= bound
