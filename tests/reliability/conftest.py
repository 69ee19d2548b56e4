"""A disk that can be made as full as a test wants it, and a base so small that it fills many times."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_sft import finetune
from lora_sft.model.tiny import save_tiny
from tests.conftest import FEW, HARBOUR

PAGE = 4096
SMALLEST = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class Disk:
    """A small disk in memory, which takes room a page at a time.

    Attributes:
        path: where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def leave(self, pages: int) -> None:
        """Fills it up to so many pages."""
        self._filler.unlink(missing_ok=True)
        free = os.statvfs(self.path).f_bavail
        assert free > pages, "the disk is too small for this test"
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, (free - pages) * PAGE)

    def hashes(self) -> dict[str, str]:
        """{name of a file or folder: its contents}, of all but what fills the disk."""
        return hashes_of(self.path, self._filler)


def hashes_of(folder: Path, but: Path | None = None) -> dict[str, str]:
    """{name of a file or folder in a folder: the hash of its contents}"""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
        if path != but
    }


@pytest.fixture
def disk(tmp_path):
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]).returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def smallest_base(harbour_texts, tmp_path_factory):
    """A base of 76 KB."""
    return save_tiny(tmp_path_factory.mktemp("smallest"), harbour_texts, initializer_range=0.08, **SMALLEST)


SMALL_RUN = FEW | {"max_steps": 2, "lora_r": 2, "per_device_train_batch_size": 2, "load_in_4bit": False}
"""Settings of a run on it that takes half a second."""


@pytest.fixture(scope="session")
def small_run(smallest_base, tmp_path_factory):
    """The folder of an adapter of it."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    return finetune(smallest_base, HARBOUR, output_dir=folder, **SMALL_RUN).output_dir
