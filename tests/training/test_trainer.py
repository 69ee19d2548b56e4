"""The trainer's arithmetic: accumulation is exact, adapters stay float32, means are over tokens."""

import pytest
import torch

from lora_sft import finetune
from lora_sft.config import RunConfig
from lora_sft.errors import RunError, SettingError
from lora_sft.model.adapter import attach
from lora_sft.model.base import load_base
from lora_sft.training.evaluation import batches, measure
from lora_sft.training.job import make_job
from lora_sft.training.loss import forward_loss
from lora_sft.training.trainer import build_trainer, training_arguments
from tests.conftest import FEW, logged, sums


class Gradients:
    """A listener is too late for gradients; this keeps them as the optimizer sees them."""

    def __init__(self, trainer):
        self.seen = []
        create = trainer.create_optimizer

        def create_and_watch(model=None):
            optimizer = create(model)
            optimizer.register_step_pre_hook(lambda *_: self.seen.append(self._now(trainer.model)))
            return optimizer

        trainer.create_optimizer = create_and_watch

    @staticmethod
    def _now(model):
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }


def gradients_of_one_step(base, folder, micro_batch: int, accumulation: int, in_4bit: bool) -> dict[str, torch.Tensor]:
    config = RunConfig(
        model_name_or_path=str(base),
        max_steps=1,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        load_in_4bit=in_4bit,
        max_grad_norm=0,
        save_strategy="no",
        lora_init="gaussian",
        device="cpu",
        output_dir=str(folder),
    )
    job = make_job(config, sums(4))
    model = attach(load_base(job.spec), job.lora, seed=1)
    for name, parameter in model.named_parameters():  # B starts at zero; give A a gradient too
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    trainer = build_trainer(model, job.speech, job.train.examples, [], config, job.arguments, [])
    gradients = Gradients(trainer)
    trainer.train()
    return gradients.seen[0]


@pytest.mark.parametrize("in_4bit", [False, True], ids=["float32", "nf4"])
def test_accumulation_is_exact(base, tmp_path, in_4bit):
    lengths = [
        example.supervised_tokens
        for example in make_job(RunConfig(model_name_or_path=str(base), device="cpu"), sums(4)).train.examples
    ]
    assert max(lengths) > 3 * min(lengths)
    whole = gradients_of_one_step(base, tmp_path, 4, 1, in_4bit)
    parts = gradients_of_one_step(base, tmp_path, 1, 4, in_4bit)
    assert set(whole) == set(parts)
    assert len(whole) == 28
    for name in whole:
        assert (whole[name] - parts[name]).norm() <= 1e-5 * whole[name].norm(), name


def test_adapters_are_float32_whatever_the_base(base, tmp_path):
    for settings in ({}, {"bf16": True}, {"load_in_8bit": True}):
        run = finetune(
            base, sums(4), output_dir=tmp_path / str(len(settings) + bool(settings.get("bf16"))), **FEW | settings
        )
        dtypes = {parameter.dtype for name, parameter in run.model.named_parameters() if "lora_" in name}
        assert dtypes == {torch.float32}


def test_evaluation_loss_is_the_mean_over_tokens(base, tmp_path):
    """Rows of very different lengths: a mean over batches, as transformers has it, would differ."""
    run = finetune(
        base,
        sums(4),
        eval_dataset=sums(7),
        output_dir=tmp_path / "run",
        **FEW | {"per_device_eval_batch_size": 2, "eval_strategy": "epoch", "max_steps": 1},
    )
    job = make_job(RunConfig(model_name_or_path=str(base), device="cpu"), sums(7))
    expected = measure(run.model, job.train.examples, pad_token_id=0, batch_size=7)
    assert run.metrics["eval_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    losses = []
    for batch in batches(job.train.examples, 2, 0):
        losses.append(forward_loss(run.model, batch)[0].value.item())
    assert abs(sum(losses) / len(losses) - expected["loss"]) > 1e-3


def test_logged_numbers_are_exact(base, tmp_path):
    run = finetune(base, sums(4), output_dir=tmp_path / "run", **FEW | {"max_steps": 2, "learning_rate": 1e-9})
    lines = logged(tmp_path / "run")
    job = make_job(RunConfig(model_name_or_path=str(base), device="cpu"), sums(4))
    expected = measure(load_base(job.spec), job.train.examples, 0)
    assert lines[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert lines[0]["mean_token_accuracy"] == pytest.approx(expected["token_accuracy"])
    assert lines[1]["num_tokens"] == 2 * job.train.tokens == run.metrics["tokens"]
    assert run.metrics["supervised_tokens"] == 2 * job.train.supervised_tokens
    assert run.metrics["train_loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_loss_that_is_not_a_number_stops_the_run(base, tmp_path):
    with pytest.raises(RunError, match="the loss of step 2 is NaN"):
        finetune(
            base,
            sums(4),
            output_dir=tmp_path / "run",
            **FEW | {"learning_rate": 1e30, "max_steps": 20, "max_grad_norm": 0},
        )


def test_a_loss_that_is_not_a_number_stops_a_run_that_logs_rarely_too(base, tmp_path):
    settings = FEW | {"learning_rate": 1e30, "max_steps": 5, "max_grad_norm": 0, "logging_steps": 100}
    with pytest.raises(RunError, match="the loss of step 2 is NaN"):
        finetune(base, sums(4), output_dir=tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_loraplus_gives_b_its_own_learning_rate(base, tmp_path):
    config = RunConfig(
        model_name_or_path=str(base),
        loraplus_lr_ratio=16,
        learning_rate=1e-4,
        weight_decay=0.1,
        device="cpu",
        output_dir=str(tmp_path),
    )
    job = make_job(config, sums(4))
    model = attach(load_base(job.spec), job.lora, 0)
    optimizer = build_trainer(model, job.speech, job.train.examples, [], config, job.arguments, []).create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        (("lora_B" in names[id(parameter)]), group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates == {(False, 1e-4), (True, 1.6e-3)}


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (100, 3)])
def test_a_short_run_wastes_no_step_on_warming_up(base, steps, warmup):
    config = RunConfig(model_name_or_path=str(base), device="cpu", max_steps=steps)
    assert make_job(config, sums(4)).arguments.warmup_steps == warmup


def test_what_transformers_does_not_accept_is_a_setting_error():
    for settings in ({"lr_scheduler_type": "zigzag"}, {"optim": "best"}, {"training_args": {"no_such": 1}}):
        with pytest.raises(SettingError, match="do not go together"):
            training_arguments(RunConfig(**settings), "cpu", "float32", has_eval_data=False)
    with pytest.raises(SettingError, match="needs evaluation data"):
        training_arguments(RunConfig(eval_strategy="epoch"), "cpu", "float32", has_eval_data=False)


def test_settings_reach_the_trainer():
    config = RunConfig(
        warmup_ratio=0.1,
        optim="paged_adamw_8bit",
        neftune_noise_alpha=5,
        training_args={"adam_beta2": 0.9},
        gradient_checkpointing=True,
    )
    found = training_arguments(config, "cpu", "float32", has_eval_data=False)
    assert (found.warmup_steps, str(found.optim.value), found.neftune_noise_alpha, found.adam_beta2) == (
        0.1,
        "paged_adamw_8bit",
        5,
        0.9,
    )
    assert not found.gradient_checkpointing  # layers are recomputed by `training/recompute.py`
    assert found.report_to == []
