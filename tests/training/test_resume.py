"""The same command again: a broken run goes on from what is whole, a finished one is left alone, another refused."""

import hashlib
import json
import shutil

import pytest
import torch

from lora_sft import finetune
from lora_sft.errors import OutputError, SettingError
from lora_sft.training.trainer import Trainer
from tests.conftest import FEW, logged, sums

SAVED = FEW | {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "lora_dropout": 0.1,
    "logging_steps": 4,
    "save_total_limit": 9,
}


class PowerCutError(Exception):
    """Ends a run in the middle of a step."""


def cut_at(step):
    class Listener:
        def started(self, total_steps, first_step): ...
        def logged(self, step, metrics): ...
        def ended(self): ...
        def stepped(self, now):
            if now == step:
                raise PowerCutError

    return {"listeners": [Listener()]}


def broken_off(base, folder, step=5, rows=12, **settings):
    """A run that got as far as the middle of a step."""
    with pytest.raises(PowerCutError):
        finetune(base, sums(rows), output_dir=folder, **SAVED | settings | cut_at(step))
    return folder


def adapter(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def hashes(folder) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    return finetune(base, sums(12), output_dir=tmp_path_factory.mktemp("whole") / "run", **SAVED).output_dir


@pytest.fixture(scope="module")
def broken(base, tmp_path_factory):
    return broken_off(base, tmp_path_factory.mktemp("broken") / "run")


@pytest.fixture
def copy(broken, tmp_path):
    """The broken run, in a folder of its own."""
    return shutil.copytree(broken, tmp_path / "run")


def test_the_same_command_again_goes_on(base, copy, whole, capfd):
    run = finetune(base, sums(12), output_dir=copy, **SAVED)
    assert f"resume: from {copy / 'checkpoint-4'}" in capfd.readouterr().err
    assert adapter(copy) == adapter(whole)
    ours, theirs = ([{**line, "tokens_per_second": 0} for line in logged(folder)] for folder in (copy, whole))
    assert ours == theirs
    assert run.metrics["tokens"] == json.loads((whole / "manifest.json").read_text())["result"]["tokens"]


def test_totals_go_on_also_from_between_two_logs(base, whole, tmp_path):
    """Logged are steps 4 and 8; the checkpoint of step 2 holds what was counted until then."""
    folder = broken_off(base, tmp_path / "run", step=3)
    finetune(base, sums(12), output_dir=folder, **SAVED)
    assert [line["num_tokens"] for line in logged(folder)] == [line["num_tokens"] for line in logged(whole)]
    assert [line["loss"] for line in logged(folder)] == [line["loss"] for line in logged(whole)]


def test_a_run_that_broke_before_its_first_checkpoint_starts_anew(base, whole, tmp_path, capfd):
    folder = broken_off(base, tmp_path / "run", step=1)
    finetune(base, sums(12), output_dir=folder, **SAVED)
    assert "broken off before its first checkpoint; it starts anew" in capfd.readouterr().err
    assert adapter(folder) == adapter(whole)


def test_a_run_that_broke_after_its_last_step_trains_none(base, whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "run")
    for name in ("manifest.json", "adapter_model.safetensors", "README.md"):
        (folder / name).unlink()
    monkeypatch.setattr(Trainer, "training_step", lambda *_, **__: pytest.fail("a step was trained"))
    run = finetune(base, sums(12), output_dir=folder, **SAVED)
    assert adapter(folder) == adapter(whole)
    before = json.loads((whole / "manifest.json").read_text())["result"]
    for name in before.keys() - {"output_dir", "seconds", "peak_bytes"}:
        assert run.metrics[name] == before[name], name


def test_a_finished_run_is_given_back_three_times_without_a_step(base, whole, tmp_path, monkeypatch, capfd):
    folder = shutil.copytree(whole, tmp_path / "run")
    before, times = hashes(folder), {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained"))
    for wanted in ("auto", True, "auto"):
        run = finetune(base, sums(12), output_dir=folder, **SAVED | {"resume_from_checkpoint": wanted})
        assert "holds this run already; nothing is trained" in capfd.readouterr().err
        assert run.metrics == json.loads((folder / "manifest.json").read_text())["result"]
        assert isinstance(run.chat("hi", max_new_tokens=2), str)
        assert hashes(folder) == before
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_a_finished_adapter_that_was_changed_is_not_given_back(base, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    flip_a_bit(folder / "adapter_model.safetensors", folder)
    with pytest.raises(OutputError, match=r"adapter_model\.safetensors was changed after the run"):
        finetune(base, sums(12), output_dir=folder, **SAVED)


# --- damaged checkpoints --------------------------------------------------------------------------------


def cut_off(file, older):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file, older):
    file.write_bytes(b"")


def deleted(file, older):
    file.unlink()


def flip_a_bit(file, older):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def swapped(file, older):
    """With the file of another checkpoint; where both are the same, with another file of this one."""
    other = (older / file.name).read_bytes()
    same = other == file.read_bytes()
    file.write_bytes((file.parent / "state.json").read_bytes() if same else other)


FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "checkpoint.json",
    "state.json",
    "state.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut_off, emptied, deleted, flip_a_bit, swapped])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(base, copy, whole, capfd, name, damage):
    assert sorted(file.name for file in (copy / "checkpoint-4").iterdir()) == sorted(FILES)
    damage(copy / "checkpoint-4" / name, copy / "checkpoint-2")
    finetune(base, sums(12), output_dir=copy, **SAVED)
    said = capfd.readouterr().err
    assert f"not used: {copy / 'checkpoint-4' / name} " in said
    assert f"resume: from {copy / 'checkpoint-2'}" in said
    assert "checkpoint-4 is set aside as checkpoint-4.aside" in said
    assert adapter(copy) == adapter(whole)


def test_if_none_is_whole_nothing_is_started_and_nothing_changed(base, copy):
    flip_a_bit(copy / "checkpoint-4" / "state.json", None)
    deleted(copy / "checkpoint-2" / "state.safetensors", None)
    before = hashes(copy)
    words = r"no checkpoint is whole \(.*checkpoint-4/state\.json was changed.*; .*checkpoint-2/state\.safetensors is m"
    with pytest.raises(OutputError, match=words):
        finetune(base, sums(12), output_dir=copy, **SAVED)
    assert hashes(copy) == before


def test_a_checkpoint_that_is_named_is_taken_or_refused(base, copy, whole, tmp_path):
    older = copy / "checkpoint-2"
    run = finetune(base, sums(12), output_dir=tmp_path / "b", **SAVED | {"resume_from_checkpoint": str(older)})
    assert adapter(run.output_dir) == adapter(whole)
    assert [line["step"] for line in logged(run.output_dir)] == [line["step"] for line in logged(whole)]
    finetune(base, sums(12), output_dir=copy, **SAVED | {"resume_from_checkpoint": str(older)})
    assert adapter(copy) == adapter(whole)
    assert (copy / "checkpoint-4.aside").is_dir()  # of the way that was not gone on
    flip_a_bit(older / "state.json", None)
    with pytest.raises(OutputError, match=r"checkpoint-2/state\.json was changed .*; .*checkpoint-6 is whole"):
        finetune(base, sums(12), output_dir=tmp_path / "c", **SAVED | {"resume_from_checkpoint": str(older)})


def test_a_run_begun_at_a_checkpoint_of_another_goes_on_from_its_own(base, copy, whole, tmp_path, capfd):
    settings = SAVED | {"resume_from_checkpoint": str(copy / "checkpoint-2")}
    with pytest.raises(PowerCutError):
        finetune(base, sums(12), output_dir=tmp_path / "b", **settings | cut_at(5))
    finetune(base, sums(12), output_dir=tmp_path / "b", **settings)
    assert f"from {tmp_path / 'b' / 'checkpoint-4'}" in capfd.readouterr().err
    assert adapter(tmp_path / "b") == adapter(whole)


@pytest.mark.parametrize("wanted", ["nowhere", "."])
def test_what_is_no_checkpoint_is_refused(base, tmp_path, wanted):
    with pytest.raises(OutputError, match="is no checkpoint"):
        finetune(base, sums(12), output_dir=tmp_path / "run", **SAVED | {"resume_from_checkpoint": wanted})


def test_where_there_is_nothing_true_is_refused_and_auto_begins(base, tmp_path):
    with pytest.raises(OutputError, match="holds no checkpoint; leave it out"):
        finetune(base, sums(4), output_dir=tmp_path / "run", **FEW | {"resume_from_checkpoint": True})
    finetune(base, sums(4), output_dir=tmp_path / "run", **FEW | {"resume_from_checkpoint": "auto"})


# --- another run than it was ----------------------------------------------------------------------------


def changed_setting(base, tied_base, tmp_path):
    return base, sums(12), {"learning_rate": 1e-3}, r"learning_rate: 0\.005 → 0\.001"


def changed_seed(base, tied_base, tmp_path):
    return base, sums(12), {"seed": 7}, "seed: 42 → 7"


def changed_dtype(base, tied_base, tmp_path):
    return base, sums(12), {"bf16": True}, "bf16: False → True"


def changed_quantization(base, tied_base, tmp_path):
    return base, sums(12), {"load_in_4bit": False}, "load_in_4bit: True → False"


def changed_data(base, tied_base, tmp_path):
    return base, sums(13), {}, r"data: \w{12}… → \w{12}…"


def changed_evaluation_data(base, tied_base, tmp_path):
    return base, sums(12), {"eval_dataset": sums(3)}, r"evaluation_data: None → \w{12}…"


def changed_base(base, tied_base, tmp_path):
    return tied_base, sums(12), {}, r"base: \w{12}… → \w{12}…"


def changed_template(base, tied_base, tmp_path):
    """Another text, the same tokens."""
    (tmp_path / "other.jinja").write_text("{# other #}" + (base / "chat_template.jinja").read_text())
    return base, sums(12), {"chat_template": str(tmp_path / "other.jinja")}, r"chat_template: \w{12}… → \w{12}…"


CHANGES = (
    changed_setting,
    changed_seed,
    changed_dtype,
    changed_quantization,
    changed_data,
    changed_evaluation_data,
    changed_base,
    changed_template,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_is_made_of_something_else_is_refused_unless_that_is_allowed(
    base, tied_base, copy, whole, tmp_path, change
):
    model, rows, settings, words = change(base, tied_base, tmp_path)
    before = hashes(copy)
    with pytest.raises(SettingError, match=f"was begun with other settings or data; {words}"):
        finetune(model, rows, output_dir=copy, **SAVED | settings)
    assert hashes(copy) == before
    names = change.__name__.removeprefix("changed_")
    names = {
        "setting": "learning_rate",
        "dtype": "bf16",
        "quantization": "load_in_4bit",
        "template": "chat_template",
    }.get(names, names)
    finetune(model, rows, output_dir=copy, **SAVED | settings | {"resume_with_changed": [names]})
    # Another template here gives the same tokens, and evaluation changes no weight.
    assert (adapter(copy) == adapter(whole)) == (change in (changed_template, changed_evaluation_data))


def test_all_differences_are_named_at_once(base, copy):
    with pytest.raises(
        SettingError, match=r"data: .*; learning_rate: .*; seed: .*resume_with_changed: \[data, learning_r"
    ):
        finetune(base, sums(11), output_dir=copy, **SAVED | {"learning_rate": 1e-3, "seed": 1})
    allowed = {"resume_with_changed": ["data", "learning_rate"]}
    with pytest.raises(SettingError, match=r"begun with other settings or data; seed: 42 → 1\."):
        finetune(base, sums(11), output_dir=copy, **SAVED | {"learning_rate": 1e-3, "seed": 1} | allowed)


def test_a_new_learning_rate_that_is_allowed_takes_effect(base, copy):
    settings = SAVED | {"learning_rate": 1e-3, "logging_steps": 1, "lr_scheduler_type": "cosine"}
    finetune(base, sums(12), output_dir=copy, **settings | {"resume_with_changed": "learning_rate"})
    rates = {line["step"]: line["learning_rate"] for line in logged(copy)}
    anew = finetune(base, sums(12), output_dir=copy.parent / "anew", **settings)
    assert [rates[step] for step in (5, 6)] == [logged(anew.output_dir)[step - 1]["learning_rate"] for step in (5, 6)]


def test_a_longer_run_goes_on_if_that_is_allowed(base, copy):
    longer = SAVED | {"max_steps": 8, "resume_with_changed": "max_steps"}
    assert finetune(base, sums(12), output_dir=copy, **longer).metrics["steps"] == 8


def test_what_makes_other_tensors_cannot_be_allowed(base, copy):
    with pytest.raises(SettingError, match="lora_r cannot change in a run"):
        finetune(base, sums(12), output_dir=copy, **SAVED | {"lora_r": 4, "resume_with_changed": "lora_r"})
    with pytest.raises(SettingError, match="resume_with_changed: learnrate: is neither a setting nor one of data"):
        finetune(base, sums(12), output_dir=copy, **SAVED | {"resume_with_changed": "learnrate"})


def test_what_changes_nothing_may_differ(base, copy, whole):
    finetune(base, sums(12), output_dir=copy, **SAVED | {"save_steps": 1, "save_total_limit": 1})
    assert adapter(copy) == adapter(whole)
    assert [entry.name for entry in copy.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_base_that_moved_is_the_same_base(base, copy, whole, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    finetune(moved, sums(12), output_dir=copy, **SAVED)
    assert adapter(copy) == adapter(whole)


# --- what is in a checkpoint ----------------------------------------------------------------------------


def test_no_pickle_and_no_secret_is_written(broken, monkeypatch):
    names = {file.name for file in (broken / "checkpoint-4").iterdir()}
    assert names == set(FILES)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))


def test_a_checkpoint_is_an_adapter_that_peft_loads(base, broken):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), broken / "checkpoint-4")
    assert any(parameter.abs().sum() > 0 for name, parameter in plain.named_parameters() if "lora_B" in name)


def test_the_patience_of_early_stopping_and_the_best_are_remembered(base, tmp_path):
    settings = SAVED | {
        "max_steps": 40,
        "eval_dataset": sums(3),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "early_stopping_patience": 3,
        "load_best_model_at_end": True,
        "learning_rate": 0.05,
        "stop_when_diverging": False,
        "save_total_limit": 1,
    }
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **settings)
    last = whole.metrics["steps"]
    assert 6 < last < 40
    folder = tmp_path / "run"
    with pytest.raises(PowerCutError):
        finetune(base, sums(12), output_dir=folder, **settings | cut_at(last - 1))
    again = finetune(base, sums(12), output_dir=folder, **settings)
    assert adapter(folder) == adapter(whole.output_dir)
    assert again.metrics["steps"] == last
    assert again.metrics["eval_loss"] == whole.metrics["eval_loss"]


@pytest.mark.parametrize("settings", [{"optim": "adafactor"}, {"optim": "sgd"}, {"lr_scheduler_type": "linear"}])
def test_other_optimizers_resume_to_the_bit(base, tmp_path, settings):
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **SAVED | settings).output_dir
    folder = broken_off(base, tmp_path / "run", **settings)
    finetune(base, sums(12), output_dir=folder, **SAVED | settings)
    assert adapter(folder) == adapter(whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_init": "pissa", "load_in_4bit": False},
        {"use_dora": True},
        {"lora_modules_to_save": "lm_head"},
        {"new_tokens": "<a>,<b>"},
        {"lora_init": "eva", "load_in_4bit": False},
        {"loraplus_lr_ratio": 4},
        {"neftune_noise_alpha": 5},
    ],
    ids=str,
)
def test_every_kind_of_adapter_resumes_to_the_bit(base, tmp_path, settings):
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **SAVED | settings).output_dir
    folder = broken_off(base, tmp_path / "run", **settings)
    finetune(base, sums(12), output_dir=folder, **SAVED | settings)
    assert adapter(folder) == adapter(whole)
