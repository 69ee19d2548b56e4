"""A run's output folder: claimed before anything slow, filled at the end, never shared by two runs.

Of several processes of one run, only the main one claims and writes.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_sft.console import is_main_process
from lora_sft.errors import OutputError
from lora_sft.model.loading import MANIFEST

LOCK = ".lock"
METRICS = "metrics.jsonl"
SETTINGS = "run.yaml"


class OutputFolder:
    """The folder of one run, held for as long as the run lives.

    Attributes:
        path: absolute.
    """

    def __init__(self, path: str | None, resume: bool = False) -> None:
        """Claims the folder; None takes the next free runs/NNN.

        Raises:
            OutputError: it holds something and `resume` is false, another run holds it, or it cannot be written.
        """
        if path is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise OutputError("several processes write to one folder: name it with output_dir")
        self.path = Path(path).expanduser().absolute() if path else _next_free(Path("runs"))
        self._is_new = not self.path.exists()
        self._lock = self._claim(resume) if is_main_process() else None

    def _claim(self, resume: bool) -> FileLock:
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise OutputError(f"output_dir {self.path}: another run is writing to it; name another folder") from None
        except OSError as error:
            raise OutputError(f"output_dir {self.path}: cannot be written: {error.strerror}") from None
        there = sorted(entry.name for entry in self.path.iterdir() if entry.name != LOCK)
        if there and not resume:
            lock.release()
            (self.path / LOCK).unlink(missing_ok=True)
            raise OutputError(f"output_dir {self.path}: {self._in_use(there)}")
        return lock

    def _in_use(self, there: list[str]) -> str:
        """What stands in the way, and what can be done."""
        if MANIFEST in there:
            return "holds a finished run; name another folder with output_dir"
        if self.last_checkpoint() is not None:
            return "holds a run that was broken off; go on with resume_from_checkpoint: true, or name another folder"
        rest = ", …" if len(there) > 3 else ""
        return f"is in use (it holds {', '.join(there[:3])}{rest}); name another folder with output_dir"

    def release(self) -> None:
        """Lets the folder go; one that was made for this run and stayed empty is removed."""
        if self._lock is None:
            return
        self._lock.release()
        (self.path / LOCK).unlink(missing_ok=True)
        if self._is_new and not any(self.path.iterdir()):
            self.path.rmdir()

    def last_checkpoint(self) -> Path | None:
        """The checkpoint of the highest step; None if there is none. A half-written one does not count."""
        found = [
            entry
            for entry in self.path.glob("checkpoint-*")
            if entry.name.removeprefix("checkpoint-").isdigit() and (entry / "trainer_state.json").is_file()
        ]
        return max(found, key=lambda entry: int(entry.name.removeprefix("checkpoint-")), default=None)

    def check_room(self, needed_bytes: int) -> None:
        """Raises OutputError if the disk has less than `needed_bytes` left."""
        free = shutil.disk_usage(self.path.parent if not self.path.exists() else self.path).free
        if free < needed_bytes:
            raise OutputError(
                f"output_dir {self.path}: {free / 2**30:.2f} GiB are free, but adapter and checkpoints take "
                f"{needed_bytes / 2**30:.2f} GiB; make room, lower save_total_limit, or set save_strategy: no"
            )

    def write(self, name: str, text: str) -> None:
        """Writes a text file under its final name only once it is whole; in the main process."""
        if self._lock is None:
            return
        staged = self.path / f".{name}.part"
        staged.write_text(text, encoding="utf-8")
        staged.replace(self.path / name)

    def forget(self, name: str) -> None:
        """Removes a file that is about to become untrue."""
        if self._lock is not None:
            (self.path / name).unlink(missing_ok=True)

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file, as `write` does."""
        self.write(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def fill(self, save: Callable[[Path], object]) -> None:
        """Lets `save` write files into a folder beside, and moves them here when all of them are there."""
        if self._lock is None:
            return
        staged = self.path / ".part"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        save(staged)
        for file in staged.iterdir():
            file.replace(self.path / file.name)
        staged.rmdir()


def _next_free(parent: Path) -> Path:
    numbers = [int(entry.name) for entry in parent.glob("*") if entry.name.isdigit()]
    return (parent / f"{max(numbers, default=0) + 1:03}").absolute()
