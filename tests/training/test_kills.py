"""A run that is killed goes on, when it is started again, as if nothing had been: at any step, at any write."""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import defaultdict

import pytest

from lora_sft import finetune
from lora_sft.training import trainer as training
from tests.conftest import FEW, logged, sums
from tests.training.killing import ended, fork, in_a_process, kill_every_write_of_a_save, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes to be killed are forked"),
]

ROWS = sums(24)
RUN = FEW | {
    "max_steps": 24,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "lora_dropout": 0.1,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "preflight": False,  # the micro-batches are counted
}
PRECISION = {"float32": {"load_in_4bit": False}, "bf16": {"load_in_4bit": False, "bf16": True}, "nf4": {}}
PACKED = {"packing": True, "max_length": 256, "per_device_train_batch_size": 1}


@pytest.fixture(scope="module", autouse=True)
def warm(base, tmp_path_factory):
    """What a first run imports and caches is there for all that are forked."""
    finetune(base, ROWS, output_dir=tmp_path_factory.mktemp("warm") / "run", **RUN | {"max_steps": 1})


def batches_of(file) -> dict[int, list[str]]:
    """{step: hashes of its micro-batches, in order}, of the last time that the step was run."""
    found: dict[int, list[str]] = defaultdict(list)
    last = -1
    for line in file.read_text().splitlines():
        step, rows = line.split()
        if int(step) != last:
            found[int(step)] = []
        found[last := int(step)].append(rows)
    return dict(found)


def adapter(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def counters(folder) -> tuple[list[dict], dict]:
    """What the run counted, line by line and in all, without what the clock says."""
    lines = [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in logged(folder)]
    result = json.loads((folder / "manifest.json").read_text())["result"]
    return lines, {name: result[name] for name in result if name not in ("seconds", "peak_bytes", "output_dir")}


def assert_same_run(folder, whole) -> None:
    assert adapter(folder) == adapter(whole)
    assert counters(folder) == counters(whole)


@pytest.mark.parametrize("order", ["random", "group_by_length"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("precision", PRECISION)
def test_a_run_that_is_killed_at_twenty_steps_ends_with_the_same_bits(base, tmp_path, precision, packed, order):
    """Each time it is started again by the same command; it dies before the first or the second half of a step."""
    settings = RUN | PRECISION[precision] | (PACKED if packed else {}) | {"train_sampling_strategy": order}
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    assert in_a_process(lambda: train(base, ROWS, whole, tmp_path / "batches", **settings), log) == 0, log.read_text()
    expected = batches_of(tmp_path / "batches")
    for step in range(3, 23):
        seen = tmp_path / f"batches-{step}"

        def until_it_dies(step=step, seen=seen):
            train(base, ROWS, broken, seen, (step, step % 2), **settings)

        assert in_a_process(until_it_dies, log) == -signal.SIGKILL, log.read_text()
        found = batches_of(seen)
        assert found, step
        assert all(rows == expected[one][: len(rows)] for one, rows in found.items()), step
        assert all(rows == expected[one] for one, rows in found.items() if one < step), step
    last = tmp_path / "batches-last"
    assert in_a_process(lambda: train(base, ROWS, broken, last, **settings), log) == 0, log.read_text()
    found = batches_of(last)
    assert found == {step: rows for step, rows in expected.items() if step >= min(found)}
    assert min(found) in (20, 22)  # the checkpoint of step 22 was still being sealed when the process died
    assert_same_run(broken, whole)


@pytest.mark.skipif(sys.platform != "linux", reason="writes are seen with ptrace")
@pytest.mark.parametrize("step", [1, 3], ids=["the first save", "a save that removes an older one"])
def test_a_save_may_be_killed_at_any_write(base, tmp_path, step):
    settings = RUN | {"max_steps": 4, "save_steps": 1, "save_total_limit": 1, "load_in_4bit": False, "logging_steps": 1}
    whole, broken, cases, log = (tmp_path / name for name in ("whole", "broken", "cases", "log"))
    cases.mkdir()
    assert in_a_process(lambda: finetune(base, ROWS, output_dir=whole, **settings), log) == 0, log.read_text()

    def die_in_all_ways():
        kill_every_write_of_a_save(step, broken, cases)
        finetune(base, ROWS, output_dir=broken, **settings)

    assert in_a_process(die_in_all_ways, log) == 0, log.read_text()
    count = len(list(cases.iterdir()))
    assert count >= 30
    began = set()
    for number in range(1, count + 1):
        folder = cases / str(number)
        at = tmp_path / "batches"
        at.unlink(missing_ok=True)
        assert in_a_process(lambda: train(base, ROWS, folder, at, **settings), log) == 0, log.read_text()  # noqa: B023
        began.add(min(batches_of(at)))
        assert_same_run(folder, whole)
        assert not list(folder.glob(".*")), number
        shutil.rmtree(folder)
    assert began == {step - 1, step}  # some deaths lose the step that was being saved, later ones nothing


def test_a_run_that_is_killed_at_twenty_random_moments_ends_with_the_same_bits(base, tmp_path):
    settings = RUN | {"max_steps": 60, "save_steps": 1, "logging_steps": 1}
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    assert in_a_process(lambda: finetune(base, ROWS, output_dir=whole, **settings), log) == 0, log.read_text()
    moments = random.Random(0)
    for kill in range(20):
        child = fork(lambda: finetune(base, ROWS, output_dir=broken, **settings), log)
        reached = 2 * kill + 2
        while (lines := broken / "metrics.jsonl").is_file() is False or lines.read_bytes().count(b"\n") < reached:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), log.read_text()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
    assert in_a_process(lambda: finetune(base, ROWS, output_dir=broken, **settings), log) == 0, log.read_text()
    assert_same_run(broken, whole)


def test_the_lock_of_a_killed_run_is_taken_over_and_that_of_a_living_one_is_not(base, tmp_path):
    settings = RUN | {"max_steps": 3, "save_steps": 1}
    folder, log, second = tmp_path / "run", tmp_path / "log", tmp_path / "second"

    def stop_in_the_middle():
        training.Trainer.training_step = lambda *rest, **options: time.sleep(600)
        finetune(base, ROWS, output_dir=folder, **settings)

    child = fork(stop_in_the_middle, log)
    try:
        while not (folder / "start.json").is_file():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), log.read_text()
            time.sleep(0.001)
        assert in_a_process(lambda: finetune(base, ROWS, output_dir=folder, **settings), second) == 3
        assert "another run is writing to it" in second.read_text()
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)
    assert (folder / ".lock").is_file()
    assert in_a_process(lambda: finetune(base, ROWS, output_dir=folder, **settings), log) == 0, log.read_text()
    assert not (folder / ".lock").is_file()
