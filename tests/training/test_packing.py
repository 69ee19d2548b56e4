"""Packing and grouping change which rows are computed together, and nothing else: losses, gradients, resuming."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Mamba2Config, Mamba2ForCausalLM

from lora_sft import finetune
from lora_sft.chat.labels import Example
from lora_sft.config import RunConfig
from lora_sft.dialect import translate
from lora_sft.model.adapter import attach
from lora_sft.model.base import load_base
from lora_sft.model.tiny import tiny_model
from lora_sft.training.batching import Batching, lay_end_to_end, lay_in_rows, plan_batches
from lora_sft.training.evaluation import pad
from lora_sft.training.job import make_job
from lora_sft.training.loader import Collator, MicroBatches
from lora_sft.training.loss import forward_loss, inputs_of
from lora_sft.training.trainer import build_trainer, choose_batching, training_arguments
from tests.conftest import FEW, logged, sums


def rows(count: int, seed: int = 0) -> list[Example]:
    """Random documents whose second half is learned."""
    random = np.random.default_rng(seed)
    ids = [random.integers(3, 500, random.integers(4, 60)).tolist() for _ in range(count)]
    return [Example(row, [-100] * (len(row) // 2) + row[len(row) // 2 :]) for row in ids]


class Lazily(list):
    """Examples as a file on disk gives them: by their number only."""

    def __getitem__(self, place):
        assert isinstance(place, int)
        return super().__getitem__(place)

    def __iter__(self):
        raise AssertionError("all rows were read at once")


def losses_of_tokens(model, batch) -> torch.Tensor:
    """Of every supervised token, in order of the rows."""
    with torch.no_grad():
        logits = model(**inputs_of(model, batch), use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return found[targets.flatten() != -100]


def test_packed_and_padded_rows_have_the_same_loss_at_every_token():
    model, examples = tiny_model(512, initializer_range=0.2), rows(20)
    apart = losses_of_tokens(model, pad(examples, 0))
    together = losses_of_tokens(model, lay_end_to_end(examples))
    rows_of_100 = lay_in_rows(examples, Batching(20, 100, packing=True), 0)
    assert len(rows_of_100["input_ids"]) > 3
    torch.testing.assert_close(losses_of_tokens(model, rows_of_100), apart, rtol=0, atol=1e-5)
    assert len(apart) == sum(example.supervised_tokens for example in examples) > 200
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    without_borders = {
        name: value for name, value in lay_end_to_end(examples).items() if name in ("input_ids", "labels")
    }
    assert (losses_of_tokens(model, without_borders) - apart).abs().max() > 0.1, "or the comparison shows nothing"


def test_packed_and_padded_rows_give_the_same_sums():
    model, examples = tiny_model(512, initializer_range=0.2), rows(20)
    (apart, _), (together, _) = (forward_loss(model, pad(examples, 0)), forward_loss(model, lay_end_to_end(examples)))
    assert together.tokens == apart.tokens
    assert together.correct == apart.correct
    torch.testing.assert_close(together.nll, apart.nll, rtol=1e-6, atol=0)


@pytest.mark.parametrize("packing", [True, False])
def test_a_micro_batch_counts_its_tokens_and_an_empty_one_teaches_nothing(packing):
    collator, examples = Collator(Batching(3, 50, packing), pad_token_id=0), rows(3)
    assert collator(examples)["tokens"] == sum(len(example.input_ids) for example in examples)
    empty = collator([])
    assert empty.pop("tokens") == 0
    model = tiny_model(512)
    loss, _ = forward_loss(model, empty, token_count=100)
    loss.value.backward()
    assert (loss.tokens, loss.nll) == (0, 0)
    assert all(not parameter.grad.any() for parameter in model.parameters())


def trainer_for(base, folder, examples, **settings):
    config = RunConfig(
        model_name_or_path=str(base), device="cpu", load_in_4bit=False, output_dir=str(folder), lora_init="gaussian",
        **{"max_length": 128, "warmup_steps": 0, "save_strategy": "no", "learning_rate": 1e-2} | settings,
    )  # fmt: skip
    job = make_job(config, sums(4))
    model = attach(load_base(job.spec), job.lora, seed=1)
    for name, parameter in model.named_parameters():  # B starts at zero; give A a gradient too
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    lengths = [len(examples[row].input_ids) for row in range(len(examples))]
    return build_trainer(model, job.speech, examples, examples, config, job.arguments, [], lengths)


def gradients_of_one_step(trainer):
    seen = []
    create = trainer.create_optimizer

    def create_and_watch(model=None):
        optimizer = create(model)
        keep = lambda *_: seen.append(  # noqa: E731
            {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        )
        optimizer.register_step_pre_hook(keep)
        return optimizer

    trainer.create_optimizer = create_and_watch
    trainer.train()
    return seen[0]


def test_one_step_over_the_same_rows_has_the_same_gradients_packed_or_padded(base, tmp_path):
    examples = rows(16)
    every_row = {"max_steps": 1, "max_grad_norm": 0}
    padded = trainer_for(
        base, tmp_path / "padded", examples, per_device_train_batch_size=4, gradient_accumulation_steps=4, **every_row
    )
    packed = trainer_for(
        base,
        tmp_path / "packed",
        Lazily(examples),
        packing=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        **every_row,
    )
    assert 1 < len(packed.get_train_dataloader()) < 8
    expected, found = gradients_of_one_step(padded), gradients_of_one_step(packed)
    assert expected.keys() == found.keys() != set()
    for name in expected:
        assert (expected[name] - found[name]).norm() <= 1e-5 * expected[name].norm(), name
    assert padded.count_seen()._replace(nll=0) == packed.count_seen()._replace(nll=0)
    assert packed.seen.tokens == sum(len(example.input_ids) for example in examples)
    assert packed.seen.nll == pytest.approx(padded.seen.nll, rel=1e-5)


@pytest.mark.parametrize("settings", [{"packing": True}, {}, {"train_sampling_strategy": "random"}])
@pytest.mark.parametrize("stop", [3, 6, 8])
def test_a_resumed_run_goes_on_with_the_same_rows(base, tmp_path, settings, stop):
    """Interrupted in the first epoch, between two, and in the second; dropout shows that the generators go on too."""
    examples = rows(24)
    settings = settings | {"num_train_epochs": 3, "lora_dropout": 0.2, "gradient_accumulation_steps": 1}
    settings |= (
        {"per_device_train_batch_size": 1, "max_length": 140}
        if "packing" in settings
        else {"per_device_train_batch_size": 4}
    )
    settings |= {"save_strategy": "steps", "save_steps": stop, "save_total_limit": 99}
    whole = trainer_for(base, tmp_path, examples, **settings)
    assert len(whole.get_train_dataloader()) == 6
    seen = watch_batches(whole)
    whole.train()
    resumed = trainer_for(base, tmp_path, examples, **settings)
    seen_again = watch_batches(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert len(seen) == 18
    assert all(seen[:6] != other for other in (seen[6:12], seen[12:]))
    assert seen_again == seen[stop:]
    after = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, after[name]), name


def watch_batches(trainer):
    seen = []
    compute = trainer.compute_loss

    def compute_and_note(model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].tolist())
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_and_note
    return seen


def test_the_processes_see_different_rows_in_every_epoch():
    lengths = [len(example.input_ids) for example in rows(23)]
    batching = Batching(4, 128, ranks=3)
    ranks = [MicroBatches(lengths, batching, rank) for rank in range(3)]
    for epoch in (0, 1):
        for rank in ranks:
            rank.set_epoch(epoch)
        assert {len(rank) for rank in ranks} == {len(list(rank)) for rank in ranks} == {2}
        assert sorted(row for rank in ranks for batch in rank for row in batch) == list(range(23))
        assert [next(iter(rank)) for rank in ranks] == plan_batches(lengths, batching, epoch).batches[:3]


def test_packing_falls_back_where_the_model_leaks(capsys):
    shape = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "num_hidden_layers": 2}
    model = Mamba2ForCausalLM(Mamba2Config(vocab_size=128, initializer_range=0.5, **shape))
    config = RunConfig(packing=True, output_dir="here")
    found = choose_batching(model, config, training_arguments(config, "cpu", "float32", False))
    assert (found.packing, found.order) == (False, "group_by_length")
    assert "packing is off: mamba2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"sample_packing": True}, {"packing": True}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": False}, {"train_sampling_strategy": "random"}),
    ],
)
def test_other_trainers_words_for_it(theirs, ours):
    assert translate(theirs)[0] == ours


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_two_processes_train_what_one_does_also_where_rows_do_not_divide(base, tmp_path, packing):
    """The last round has one micro-batch for two processes: one of them computes an empty one."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(9)))
    same = FEW | {"packing": packing, "max_steps": -1, "num_train_epochs": 2, "lora_init": "gaussian"}
    same |= {"load_in_4bit": False, "max_length": 128}
    alone = finetune(
        base, tmp_path / "rows.jsonl", output_dir=tmp_path / "one", **same | {"per_device_train_batch_size": 2}
    )
    words = [
        f"{name}={value}" for name, value in same.items() if name not in ("listeners", "per_device_train_batch_size")
    ]
    words += [f"model={base}", f"dataset={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'two'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29618"]
    command = [*launcher, "-m", "lora_sft", "train", *words, "per_device_train_batch_size=1", "--json"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-9000:]
    ours, theirs = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(ours) == len(theirs) == alone.metrics["steps"] > 2
    for here, there in zip(ours, theirs, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert (here["num_tokens"], here["num_supervised_tokens"]) == (
            there["num_tokens"],
            there["num_supervised_tokens"],
        )
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in expected:
        assert (expected[name] - found[name]).norm() <= 1e-4 * expected[name].norm(), name
