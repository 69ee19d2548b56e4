"""`lora-sft replay` shows the module in which a failed step went wrong, on the same numbers."""

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_sft import finetune
from lora_sft.cli import main
from lora_sft.errors import RunError
from tests.conftest import FEW, HARBOUR

OVERFLOWS = FEW | {"learning_rate": 1e30, "stop_when_diverging": False}
"""The first update makes weights whose product is no number any more."""


def run(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def fail(base, folder, **settings):
    with pytest.raises(RunError) as error:
        finetune(base, HARBOUR, output_dir=folder, **settings)
    return str(error.value)


@pytest.mark.parametrize(
    "settings",
    [{"load_in_4bit": False}, {}, {"load_in_4bit": False, "bf16": True}, {"packing": True, "max_length": 256}],
    ids=["float32", "nf4", "bf16", "packed"],
)
def test_replay_comes_to_the_same_module_as_the_run(base, tmp_path, capsys, settings):
    words = fail(base, tmp_path / "run", **OVERFLOWS | settings)
    code, out, _ = run(capsys, "replay", tmp_path / "run", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["kind"], found["after_step"], found["step"], found["reproduced"]) == ("loss", 1, 2, True)
    assert f"the output of {found['first']['module']}" in words
    first = next(look for look in found["modules"] if look["not_finite"])
    assert found["first"] | first == found["first"] | {"token": first["token"]}
    assert math.isnan(found["loss_now"])
    assert found["rows"][0]["source"] in words


def test_the_first_bad_module_is_that_of_plain_peft(base, tmp_path, capsys):
    """The saved adapter on the plain base, in plain PEFT: the same module is the first to give NaN or Inf."""
    fail(base, tmp_path / "run", **OVERFLOWS | {"load_in_4bit": False})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, tmp_path / "run/failure/adapter")
    bad = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: (
                    None if not isinstance(output, torch.Tensor) or output.isfinite().all() else bad.append(name)
                )
            )
    batch = load_file(tmp_path / "run/failure/batch.safetensors")
    with torch.no_grad():
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    found = json.loads(run(capsys, "replay", tmp_path / "run", "--json")[1])
    assert found["first"]["module"] == bad[0]


def test_dropout_falls_on_the_same_values(base, tmp_path, capsys):
    """A learning rate that is far too high: the loss of the replay is that of the run, to the last bit."""
    fail(base, tmp_path / "run", **FEW | {"learning_rate": 3, "lora_dropout": 0.3})
    found = json.loads(run(capsys, "replay", tmp_path / "run", "--json")[1])
    assert (found["kind"], found["reproduced"], found["first"]) == ("diverged", True, None)
    assert found["loss_now"] == found["loss"]


@pytest.mark.parametrize("start", ["pissa", "eva", "gaussian"])
def test_starts_that_are_not_the_default_are_replayed_too(base, tmp_path, capsys, start):
    fail(base, tmp_path / "run", **FEW | {"learning_rate": 30, "lora_init": start, "load_in_4bit": False})
    capsys.readouterr()  # PEFT's EVA prints
    found = json.loads(run(capsys, "replay", tmp_path / "run", "--json")[1])
    assert found["loss_now"] == pytest.approx(found["loss"], rel=1e-5)


def test_a_bad_weight_of_the_base_is_shown(base, tmp_path, capsys):
    from tests.training.test_watch import spoil

    name = "model.layers.1.mlp.up_proj.weight"
    bad = spoil(base, tmp_path / "bad", lambda tensors: tensors[name].fill_(math.inf))
    fail(bad, tmp_path / "run", **FEW | {"load_in_4bit": False})
    code, out, _ = run(capsys, "replay", tmp_path / "run")
    assert code == 0
    assert "weights with NaN or Inf: base_model.model.model.layers.1.mlp.up_proj.base_layer.weight" in out
    assert (
        "first NaN or Inf: base_model.model.model.layers.1.mlp.up_proj.base_layer (forward), token 0 of harbour" in out
    )
    assert "→" in out


def test_a_base_that_moved_is_named_anew(base, tmp_path, capsys):
    moved = shutil.copytree(base, tmp_path / "there")
    fail(moved, tmp_path / "run", **OVERFLOWS)
    moved.rename(tmp_path / "elsewhere")
    assert run(capsys, "replay", tmp_path / "run")[0] == 2
    assert run(capsys, "replay", tmp_path / "run", "--model", tmp_path / "elsewhere")[0] == 0


def test_a_folder_without_a_failed_step_says_so(tmp_path, capsys):
    code, _, err = run(capsys, "replay", tmp_path)
    assert (code, "no failed step here (failure/failure.json)" in err) == (2, True)


def test_the_exit_code_of_a_failed_run_is_one(base, tmp_path, capsys):
    words = [f"{name}={value}" for name, value in OVERFLOWS.items() if name != "listeners"]
    code, _, err = run(capsys, "train", *words, f"model={base}", f"dataset={HARBOUR}", f"output_dir={tmp_path / 'run'}")
    assert code == 1
    assert f"lora-sft replay {tmp_path / 'run'}" in err
    assert not list(tmp_path.glob("run/checkpoint-*"))
