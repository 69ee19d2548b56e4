"""A checkpoint is whole or not there; what is damaged is named, and what is not ours is never removed."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_sft.errors import OutputError, RunError
from lora_sft.training import checkpoints
from lora_sft.training.checkpoints import Checkpoints, looks_whole, newest_whole, tidy, what_is_wrong
from lora_sft.training.state import read_state, write_state


def write(folder: Path) -> None:
    (folder / "one").write_text("1" * 100)
    (folder / "two").write_text("2" * 100)


def saved(folder: Path, *steps: int, keep: int | None = None, best: int | None = None) -> list[str]:
    """Checkpoints of some steps, saved one after the other → what lies there afterwards."""
    writer = Checkpoints(folder, keep)
    for step in steps:
        writer.save(step, best, write)
    writer.wait()
    return sorted(entry.name for entry in folder.iterdir())


def test_only_the_newest_are_kept_and_the_best(tmp_path):
    assert saved(tmp_path / "a", 1, 2, 3, 10, keep=2) == ["checkpoint-10", "checkpoint-3"]
    assert saved(tmp_path / "b", 1, 2, 3, 10, keep=1, best=2) == ["checkpoint-10", "checkpoint-2"]
    assert len(saved(tmp_path / "c", 1, 2, 3, 10)) == 4


@pytest.mark.parametrize("damage", ["foreign file", "other folder", "cut", "link"])
def test_what_is_not_ours_is_never_removed(tmp_path, damage):
    saved(tmp_path, 1)
    old = tmp_path / "checkpoint-1"
    if damage == "foreign file":
        (old / "thesis.txt").write_text("mine")
    elif damage == "other folder":
        old.rename(tmp_path / "checkpoint-0")
    elif damage == "cut":
        (old / "one").write_text("")
    else:
        (old / "one").unlink()
        (old / "one").symlink_to(old / "two")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "thesis.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    saved(tmp_path, 2, 3, 4, keep=1)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-x"} | {
        path.parent.name for path in before if path.parent != tmp_path
    }


def test_what_lies_in_the_way_is_set_aside_unless_it_is_ours(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "thesis.txt").write_text("mine")
    assert saved(tmp_path, 1, 2) == ["checkpoint-1", "checkpoint-2", "checkpoint-2.aside"]
    assert (tmp_path / "checkpoint-2.aside" / "thesis.txt").read_text() == "mine"


def test_every_byte_is_looked_at(tmp_path):
    saved(tmp_path, 7)
    file = tmp_path / "checkpoint-7" / "two"
    file.write_text("2" * 99 + "3")
    assert looks_whole(tmp_path / "checkpoint-7")
    assert what_is_wrong(tmp_path / "checkpoint-7") == f"{file} was changed (another sha256 than when it was written)"


def test_the_list_of_files_is_sealed_too(tmp_path):
    saved(tmp_path, 7, 8)
    file = tmp_path / "checkpoint-7" / "checkpoint.json"
    whole = file.read_text()
    contents = json.loads(whole)
    contents["files"].pop("two")
    for text, words in (
        (json.dumps(contents), "was changed"),
        (whole[:-10], "cannot be read"),
        ("[]", "cannot be read"),
        ((tmp_path / "checkpoint-8" / "checkpoint.json").read_text(), "is of step 8"),
    ):
        file.write_text(text)
        assert what_is_wrong(tmp_path / "checkpoint-7") == f"{file} {words}" or words == "was changed"
        assert words in what_is_wrong(tmp_path / "checkpoint-7")


def test_the_newest_that_is_whole_is_found_by_number_not_by_name(tmp_path):
    saved(tmp_path, 9, 10, 11)
    (tmp_path / "checkpoint-11" / "one").unlink()
    found, problems = newest_whole(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert problems == [f"{tmp_path / 'checkpoint-11' / 'one'} is missing"]


def test_a_write_that_fails_is_told_and_leaves_the_older_ones(tmp_path):
    saved(tmp_path, 1)
    writer = Checkpoints(tmp_path, 1)

    def fail(folder):
        (folder / "one").write_text("1")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"checkpoint-2: the disk is full"):
        writer.save(2, None, fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]


def test_what_fails_in_the_background_is_told_at_the_next_occasion(tmp_path, monkeypatch):
    def fail(folder, step):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "_seal", fail)
    writer = Checkpoints(tmp_path, 1)
    writer.save(1, None, write)
    with pytest.raises(OutputError, match=r"checkpoint-1: cannot be written: Input/output error"):
        writer.wait()
    writer.wait()  # told once


def test_the_training_goes_on_while_a_checkpoint_is_sealed(tmp_path, monkeypatch):
    go = threading.Event()
    seal = checkpoints._seal
    monkeypatch.setattr(checkpoints, "_seal", lambda *given: go.wait(60) and seal(*given))
    writer = Checkpoints(tmp_path, 1)
    writer.save(1, None, write)
    assert [entry.name for entry in tmp_path.iterdir()] == [".checkpoint-1.part"]
    go.set()
    writer.wait()
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]


def test_what_was_sealed_gets_its_name_and_what_was_not_goes(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.part")
    (tmp_path / ".checkpoint-3.part").mkdir()
    (tmp_path / ".checkpoint-0.gone").mkdir()
    (tmp_path / ".checkpoint-mine").mkdir()
    tidy(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".checkpoint-mine", "checkpoint-1", "checkpoint-2"]


def test_a_state_comes_back_to_the_bit(tmp_path):
    shared = torch.arange(3)
    state = {
        "numbers": [1, 0.1, float("inf"), -0.0, True, None, "x"],
        3: (torch.tensor(float("nan")), torch.ones(2, dtype=torch.bfloat16), torch.zeros(0)),
        "twice": [shared, shared, shared[1:]],
        "numpy": ("MT19937", np.arange(4, dtype=np.uint32), np.float64(0.3)),
    }
    write_state(tmp_path, state)
    back = read_state(tmp_path)
    assert back["numbers"] == state["numbers"]
    for ours, theirs in zip([*back[3], *back["twice"]], [*state[3], *state["twice"]], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))
    assert back["numpy"][1].dtype == np.uint32
    assert back["numpy"][1].tolist() == [0, 1, 2, 3]
    assert type(back["numpy"]) is tuple


def test_a_state_that_is_no_plain_data_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"keeps a \w+Path, which cannot be written"):
        write_state(tmp_path, {"optimizer": {"state": Path("x")}})
