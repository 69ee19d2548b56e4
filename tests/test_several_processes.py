"""Two processes with one device each train the same adapter as one process with the whole batch."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from lora_sft import finetune
from tests.conftest import FEW, HARBOUR, logged


@pytest.mark.slow
def test_two_processes_train_what_one_does(base, tmp_path):
    settings = {
        "train_sampling_strategy": "sequential",
        "max_steps": 3,
        "lora_init": "gaussian",
        "save_strategy": "epoch",
        "eval_size": 3,
        "eval_strategy": "epoch",
        "per_device_eval_batch_size": 1,
    }
    alone = finetune(
        base, HARBOUR, output_dir=tmp_path / "alone", **FEW | settings | {"per_device_train_batch_size": 4}
    )
    words = [f"{name}={value}" for name, value in (FEW | settings).items() if name != "listeners"]
    words += [f"model={base}", f"dataset={HARBOUR}", f"output_dir={tmp_path / 'two'}", "per_device_train_batch_size=2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29617"]
    done = subprocess.run(
        [*launcher, "-m", "lora_sft", "train", *words, "--json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    assert json.loads(done.stdout)["steps"] == 3
    for ours, theirs in zip(logged(tmp_path / "alone"), logged(tmp_path / "two"), strict=True):
        name = "loss" if "loss" in ours else "eval_loss"  # three rows to evaluate on do not divide by two
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
        assert ours.get("num_tokens") == theirs.get("num_tokens")
    expected, found = (
        load_file(alone.output_dir / "adapter_model.safetensors"),
        load_file(tmp_path / "two/adapter_model.safetensors"),
    )
    for name in expected:
        assert (expected[name] - found[name]).norm() <= 1e-4 * expected[name].norm(), name
    assert done.stderr.count("precision: ") == 1
