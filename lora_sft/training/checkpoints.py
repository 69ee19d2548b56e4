"""The files of a training at some step → `checkpoint-N/`, which is whole or not there, and read only if it is whole.

A checkpoint is written into `.checkpoint-N.part`; then `checkpoint.json` is added, with the hash of every file, all is
brought to the disk, and the folder takes its name. Only then are older ones removed, and of those only what this module
wrote: whatever else bears such a name stays where it is.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_sft.console import say
from lora_sft.errors import OutputError
from lora_sft.model.disk import settle, writing
from lora_sft.model.fingerprint import hash_of_file

CONTENTS = "checkpoint.json"
STATE = "trainer_state.json"


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written, from its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints_in(folder: Path) -> list[Path]:
    """All that is called like a checkpoint, the newest first, whole or not."""
    named = [entry for entry in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-(0|[1-9]\d*)", entry.name)]
    return sorted(named, key=step_of, reverse=True)


# --- reading ------------------------------------------------------------------------------------------


def what_is_wrong(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is not as it was written, every byte looked at; None if all are."""
    contents = _contents(checkpoint)
    if isinstance(contents, str):
        return contents
    for name, facts in contents.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{file} has {file.stat().st_size:,} bytes instead of {facts['bytes']:,}"
        if hash_of_file(file) != facts["sha256"]:
            return f"{file} was changed (another sha256 than when it was written)"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in which nothing is wrong, or None; and what is wrong with those after it."""
    problems: list[str] = []
    for checkpoint in checkpoints_in(folder):
        wrong = what_is_wrong(checkpoint)
        if wrong is None:
            return checkpoint, problems
        problems.append(wrong)
    return None, problems


def looks_whole(checkpoint: Path) -> bool:
    """Whether a folder holds the files that we wrote, of their sizes, and no others; without reading them."""
    contents = _contents(checkpoint)
    if isinstance(contents, str):
        return False
    there = {entry.name: entry for entry in checkpoint.iterdir() if entry.name != CONTENTS}
    return there.keys() == contents.keys() and all(
        entry.is_file() and not entry.is_symlink() and entry.stat().st_size == contents[name]["bytes"]
        for name, entry in there.items()
    )


def _contents(checkpoint: Path) -> dict[str, dict[str, Any]] | str:
    """{file: {"bytes", "sha256"}} of a checkpoint, or what is wrong with `checkpoint.json`."""
    file = checkpoint / CONTENTS
    try:
        written = json.loads(file.read_bytes())
        contents: dict[str, dict[str, Any]] = written["files"]
        if written.pop("sha256") != _hash_of_json(written):
            return f"{file} was changed (another sha256 than when it was written)"
    except FileNotFoundError:
        return f"{file} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{file} cannot be read"
    if written["step"] != step_of(checkpoint):
        return f"{file} is of step {written['step']}"
    return contents


def _hash_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- writing ------------------------------------------------------------------------------------------


class Checkpoints:
    """Writes the checkpoints of a run.

    What reads the model happens at once. Hashing and waiting for the disk need nothing of it and are done in a thread,
    while the training goes on; a process that dies meanwhile leaves the checkpoint before this one.

    Args:
        folder: the run's.
        keep: how many are kept, besides the best; None keeps all.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, best_step: int | None, write: Callable[[Path], object]) -> None:
        """Lets `write` put files into a folder, which becomes the checkpoint of a step.

        Raises:
            OutputError: the disk is full or cannot be written, now or with the checkpoint before; the older ones hold.
        """
        self.wait()
        target = checkpoint_of(self.folder, step)
        part = self.folder / f".{target.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        with writing(part, what=str(target)):
            try:
                part.mkdir(parents=True)
                write(part)
            except BaseException as error:
                if isinstance(error, Exception):
                    shutil.rmtree(part, ignore_errors=True)  # makes room again
                raise
        self._thread = threading.Thread(target=self._finish, args=(part, target, best_step), name=target.name)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the last checkpoint is in its place.

        Raises:
            OutputError: it could not be brought there.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _finish(self, part: Path, target: Path, best_step: int | None) -> None:
        """Runs in the thread."""
        try:
            with writing(part, what=str(target)):
                _seal(part, step_of(target))
                _put_in_place(part, target)
                self._rotate(target, best_step)
        except BaseException as error:
            self._error = error

    def _rotate(self, newest: Path, best_step: int | None) -> None:
        """Removes checkpoints that are too many; never the newest, nor the best, nor what is not ours."""
        if self.keep is None:
            return
        ours = [one for one in checkpoints_in(self.folder) if step_of(one) <= step_of(newest) and looks_whole(one)]
        for one in ours[self.keep :]:
            if step_of(one) != best_step and one != newest:
                _remove(one)


def _seal(part: Path, step: int) -> None:
    """Adds `checkpoint.json`, and waits until all is on the disk."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": hash_of_file(file)} for file in sorted(part.iterdir())}
    contents = {"step": step, "files": files}
    text = json.dumps({**contents, "sha256": _hash_of_json(contents)}, indent=2)
    unsealed = part / f"{CONTENTS}.part"
    unsealed.write_text(text + "\n", encoding="utf-8")
    settle(part)
    unsealed.rename(part / CONTENTS)  # its name says: all is here
    _settle_names(part)


def _put_in_place(part: Path, target: Path) -> None:
    """Gives a sealed checkpoint its name; what bears it already is replaced if it is ours and whole, else set aside."""
    if target.exists() or target.is_symlink():
        if looks_whole(target):
            _remove(target)
        else:
            set_aside(target)
    part.rename(target)
    _settle_names(target.parent)


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint that is not to be resumed from → its new place. Nothing of it is lost."""
    number, place = 1, checkpoint.with_name(f"{checkpoint.name}.aside")
    while place.exists() or place.is_symlink():
        number += 1
        place = checkpoint.with_name(f"{checkpoint.name}.aside{number}")
    checkpoint.rename(place)
    say("checkpoint", f"{checkpoint.name} is set aside as {place.name}")
    return place


def _remove(checkpoint: Path) -> None:
    """Takes the name away first: a process that dies here leaves no half of a checkpoint under it."""
    gone = checkpoint.with_name(f".{checkpoint.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Clears up after a process that died while it wrote or removed a checkpoint: what was sealed gets its name."""
    for entry in sorted(folder.glob(".checkpoint-*")):
        if re.fullmatch(r"\.checkpoint-\d+\.(part|gone)", entry.name) and entry.is_dir() and not entry.is_symlink():
            target = entry.with_name(entry.stem[1:])
            if entry.suffix == ".part" and (entry / CONTENTS).is_file() and not target.exists():
                entry.rename(target)
            else:
                shutil.rmtree(entry, ignore_errors=True)


def _settle_names(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_damaged(checkpoint: Path) -> None:
    """Raises OutputError if a checkpoint that was named is none, or is not as it was written."""
    if not checkpoint.is_dir() or not re.fullmatch(r"checkpoint-\d+", checkpoint.name):
        raise OutputError(f"resume_from_checkpoint: {checkpoint} is no checkpoint (a folder checkpoint-N of a run)")
    if wrong := what_is_wrong(checkpoint):
        whole, _ = newest_whole(checkpoint.parent)
        instead = f"; {whole} is whole" if whole else ""
        raise OutputError(f"resume_from_checkpoint: {wrong}{instead}")
