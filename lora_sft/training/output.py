"""A run's output folder: claimed before anything slow, filled at the end, never shared by two runs.

It says itself how far its run came: `start.json` lies in it from the first step on, `manifest.json` at the end. A run
that was broken off between the two goes on; a finished one is not written to any more.

Of several processes of one run, only the main one claims and writes.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_sft.console import is_main_process
from lora_sft.errors import OutputError
from lora_sft.model.disk import settle, writing
from lora_sft.model.loading import MANIFEST
from lora_sft.training.checkpoints import tidy

LOCK = ".lock"
START = "start.json"
METRICS = "metrics.jsonl"
SETTINGS = "run.yaml"
BEFORE_START = re.compile(r"bad_rows\.jsonl|\..*\.part|\.part")
"""What a run that died before its first step may have left."""


class OutputFolder:
    """The folder of one run, held for as long as the run lives.

    Attributes:
        path: absolute.
        begun: a run was begun in it before this one.
        finished: and it was finished. Then nothing is written here.
    """

    def __init__(self, path: str | None, resume: bool = False) -> None:
        """Claims the folder; None takes the next free runs/NNN.

        Args:
            resume: a run that was begun in the folder may go on.

        Raises:
            OutputError: it holds something else, another run holds it, or it cannot be written.
        """
        if path is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise OutputError("several processes write to one folder: name it with output_dir")
        self.path = Path(path).expanduser().absolute() if path else _next_free(Path("runs"))
        self._is_new = not self.path.exists()
        self._lock = self._claim(resume) if is_main_process() else None
        self.begun = (self.path / START).is_file()
        self.finished = self.begun and (self.path / MANIFEST).is_file()
        if self._writes and self.begun:
            tidy(self.path)

    @property
    def _writes(self) -> bool:
        return self._lock is not None and not self.finished

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
        others = [name for name in there if not BEFORE_START.fullmatch(name)]
        if others and not (resume and START in there):
            self._let_go(lock)
            raise OutputError(f"output_dir {self.path}: {self._in_use(others)}")
        return lock

    def _in_use(self, there: list[str]) -> str:
        """What stands in the way, and what can be done."""
        if MANIFEST in there:
            return "holds a finished run; name another folder with output_dir"
        if START in there:
            return "holds a run that was broken off; go on with resume_from_checkpoint: auto, or name another folder"
        rest = ", …" if len(there) > 3 else ""
        return f"is in use (it holds {', '.join(there[:3])}{rest}); name another folder with output_dir"

    def _let_go(self, lock: FileLock) -> None:
        # The name goes first: whoever opened this file meanwhile gets no second lock beside a new one.
        (self.path / LOCK).unlink(missing_ok=True)
        lock.release()

    def release(self) -> None:
        """Lets the folder go; one that was made for this run and stayed empty is removed."""
        if self._lock is None:
            return
        self._let_go(self._lock)
        if self._is_new and not any(self.path.iterdir()):
            self.path.rmdir()

    def check_room(self, needed_bytes: int) -> None:
        """Raises OutputError if the disk has less than `needed_bytes` left."""
        free = shutil.disk_usage(self.path.parent if not self.path.exists() else self.path).free
        if self._writes and free < needed_bytes:
            raise OutputError(
                f"output_dir {self.path}: {free / 2**30:.2f} GiB are free, but adapter and checkpoints take "
                f"{needed_bytes / 2**30:.2f} GiB; make room, lower save_total_limit, or set save_strategy: no"
            )

    def write(self, name: str, text: str) -> None:
        """Writes a text file under its final name only once it is whole and on the disk."""
        if not self._writes:
            return
        staged = self.path / f".{name}.part"
        with writing(self.path / name, len(text.encode())):
            with staged.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(self.path / name)

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file, as `write` does."""
        self.write(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def fill(self, save: Callable[[Path], object]) -> None:
        """Lets `save` write files into a folder beside, and moves them here when all of them are there."""
        if not self._writes:
            return
        staged = self.path / ".part"
        shutil.rmtree(staged, ignore_errors=True)
        with writing(staged, what=f"output_dir {self.path}"):
            staged.mkdir()
            save(staged)
            settle(staged)
            for file in staged.iterdir():
                file.replace(self.path / file.name)
            staged.rmdir()


def _next_free(parent: Path) -> Path:
    numbers = [int(entry.name) for entry in parent.glob("*") if entry.name.isdigit()]
    return (parent / f"{max(numbers, default=0) + 1:03}").absolute()
