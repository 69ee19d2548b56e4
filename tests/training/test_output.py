"""The output folder: held by one run, refused when it holds something, never half-filled."""

import pytest

from lora_sft.errors import OutputError
from lora_sft.training.output import OutputFolder


def test_a_new_folder_that_stayed_empty_is_removed(tmp_path):
    OutputFolder(str(tmp_path / "a")).release()
    assert not (tmp_path / "a").exists()


def test_a_folder_of_the_user_is_never_removed(tmp_path):
    (tmp_path / "a").mkdir()
    OutputFolder(str(tmp_path / "a")).release()
    assert (tmp_path / "a").is_dir()


def test_two_runs_cannot_hold_one_folder(tmp_path):
    first = OutputFolder(str(tmp_path / "a"))
    with pytest.raises(OutputError, match="another run is writing to it"):
        OutputFolder(str(tmp_path / "a"), resume=True)
    first.release()
    OutputFolder(str(tmp_path / "a")).release()


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"is in use \(it holds thesis.txt\)"):
        OutputFolder(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_that_was_broken_off_can_go_on_if_it_is_asked_to(tmp_path):
    (tmp_path / "start.json").write_text("{}")
    with pytest.raises(OutputError, match="was broken off; go on with resume_from_checkpoint: auto"):
        OutputFolder(str(tmp_path))
    folder = OutputFolder(str(tmp_path), resume=True)
    assert (folder.begun, folder.finished) == (True, False)
    folder.release()


def test_a_folder_of_something_else_is_refused_also_when_a_run_may_go_on(tmp_path):
    """A folder called checkpoint-3 does not make it a run of ours."""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    with pytest.raises(OutputError, match=r"is in use \(it holds checkpoint-3\)"):
        OutputFolder(str(tmp_path), resume=True)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-3"]


def test_what_a_run_left_that_died_before_it_began_is_no_obstacle(tmp_path):
    (tmp_path / "bad_rows.jsonl").write_text("{}")
    (tmp_path / ".lock").write_text("")
    folder = OutputFolder(str(tmp_path), resume=True)
    assert not folder.begun
    folder.release()


def test_nothing_is_written_to_a_finished_run(tmp_path):
    for name in ("start.json", "manifest.json"):
        (tmp_path / name).write_text("{}")
    folder = OutputFolder(str(tmp_path), resume=True)
    assert folder.finished
    folder.write("README.md", "other")
    folder.fill(lambda staged: (staged / "one").write_text("1"))
    folder.release()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "start.json"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        OutputFolder(str(tmp_path / "file" / "inside"))


def test_files_arrive_together_or_not_at_all(tmp_path):
    folder = OutputFolder(str(tmp_path / "a"))

    def save(staged):
        (staged / "one").write_text("1")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        folder.fill(save)
    assert not (folder.path / "one").exists()
    folder.fill(lambda staged: (staged / "one").write_text("1"))
    assert (folder.path / "one").read_text() == "1"
    folder.release()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path):
    folder = OutputFolder(str(tmp_path / "a"))
    folder.check_room(1)
    with pytest.raises(OutputError, match="make room, lower save_total_limit"):
        folder.check_room(2**60)
    folder.release()


def test_of_several_processes_only_the_main_one_writes(tmp_path, monkeypatch):
    main = OutputFolder(str(tmp_path / "a"))
    monkeypatch.setenv("RANK", "1")
    other = OutputFolder(str(tmp_path / "a"))
    other.write("x", "x")
    other.release()
    assert [entry.name for entry in main.path.iterdir()] == [".lock"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OutputError, match="name it with output_dir"):
        OutputFolder(None)
    main.release()
