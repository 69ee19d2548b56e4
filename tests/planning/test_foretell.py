"""A run that its plan chose settings for, and the peak that stands in its record."""

import json

import pytest
import yaml

from lora_sft import finetune, plan
from lora_sft.config import RunConfig
from lora_sft.planning.foretell import CHOSEN
from lora_sft.settings import from_words
from tests.conftest import FEW, sums
from tests.training.test_resume import SAVED, adapter, broken_off

AUTO = FEW | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "auto": True}


def test_auto_trains_with_what_the_plan_chose_and_says_it(base, tmp_path, capfd):
    run = finetune(base, sums(16), output_dir=tmp_path / "run", **AUTO)
    said = capfd.readouterr().err
    assert "settings that were looked at" in said
    assert "plan: fits: needs" in said
    kept = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert kept["per_device_train_batch_size"] * kept["gradient_accumulation_steps"] == 8
    assert kept["per_device_train_batch_size"] == 8, "there is room for the whole batch at once"
    assert kept["gradient_checkpointing"] is False
    assert "auto" not in kept or kept["auto"] is False
    assert run.metrics["steps"] == 3


def test_a_resumed_run_keeps_what_was_chosen_whatever_fits_now(base, tmp_path, monkeypatch, capfd):
    settings = SAVED | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "auto": True}
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **settings)
    folder = broken_off(
        base,
        tmp_path / "run",
        **{name: settings[name] for name in settings if name not in SAVED}
        | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    monkeypatch.setattr("lora_sft.planning.foretell.choose_settings", None)  # it would choose anew
    capfd.readouterr()
    finetune(base, sums(12), output_dir=folder, **settings)
    assert "auto: as when the run was begun" in capfd.readouterr().err
    assert adapter(folder) == adapter(whole.output_dir)


def test_what_was_foretold_stands_beside_what_was_measured(base, tmp_path):
    folder = finetune(base, sums(12), output_dir=tmp_path / "run", **FEW).output_dir
    memory = json.loads((folder / "manifest.json").read_text())["memory"]
    asked = {name: value for name, value in FEW.items() if name in RunConfig.model_fields}
    told = plan(base, sums(12), device="cpu", **asked | {"gradient_checkpointing": False})
    assert memory["foretold_bytes"] == told.peak.allocated
    assert memory["certainty"] == "simulated"
    assert sum(memory["parts"].values()) == memory["foretold_bytes"]
    assert memory["measured_bytes"] >= 0
    assert "foretold" in (folder / "report.html").read_text()


def test_without_preflight_nothing_is_foretold(base, tmp_path):
    folder = finetune(base, sums(12), output_dir=tmp_path / "run", preflight=False, **FEW).output_dir
    assert "foretold_bytes" not in json.loads((folder / "manifest.json").read_text())["memory"]


def test_a_run_is_finished_whatever_happens_to_its_foretelling(base, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("no such model")

    monkeypatch.setattr("lora_sft.planning.foretell.make_plan", refuse)
    folder = finetune(base, sums(12), output_dir=tmp_path / "run", **FEW).output_dir
    memory = json.loads((folder / "manifest.json").read_text())["memory"]
    assert memory["not_foretold"] == "AssertionError: no such model"


@pytest.mark.parametrize(("words", "value"), [("5", 5), ("true", True), ("selective", "selective"), ("false", False)])
def test_so_many_layers_are_asked_for_by_their_number(words, value):
    config = RunConfig(**from_words(("--gradient-checkpointing", words)))
    assert config.gradient_checkpointing == value
    assert type(config.gradient_checkpointing) is type(value)


def test_what_auto_chooses_are_settings():
    assert set(CHOSEN) <= set(RunConfig.model_fields)
