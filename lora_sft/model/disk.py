"""What a write raised → whether the disk is full, and the one error that says where and how much is needed.

Python, pyarrow, safetensors, tokenizers and PyTorch each have errors of their own for a full disk.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_sft.errors import LoraSftError, OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, no quota, or a file larger than is allowed."""

WORDS = (
    r"No space left on device|Disk quota exceeded|File too large|\(os error (28|122|27)\)"  # the system's own words
    r"|PytorchStreamWriter failed writing|\d+ requested and \d+ written"  # PyTorch's, NumPy's
)
"""How Rust and C++ say so, whose errors carry no number, and other programs in what they print."""

TOLD = "the disk is full"


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it arose from, is that the disk has no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if re.search(WORDS, str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def full_disk_told(
    path: Path, needed_bytes: int = 0, what: str = "", kind: type[LoraSftError] = OutputError
) -> Iterator[None]:
    """A block that writes to `path`: whatever error a full disk gives becomes one with path and bytes.

    Args:
        needed_bytes: what the block writes, if that is known; what was begun is measured.
        what: how the error calls the place, if not by its path alone: `output_dir /runs/1`.
        kind: the class of the error.
    """
    try:
        yield
    except Exception as error:
        if TOLD in str(error) or not is_full(error):
            raise
        free = free_bytes(path)
        needed = max(needed_bytes, size_of(path), free + 1)
        raise kind(
            f"{what or path}: {TOLD}: at least {needed:,} bytes are needed, {free:,} are free; make room, or "
            "name a folder on another disk"
        ) from error


@contextmanager
def writing(path: Path, needed_bytes: int = 0, what: str = "") -> Iterator[None]:
    """As `full_disk_told`, for a block that does nothing but write: every other error of the disk is one of ours too.

    Raises:
        OutputError: how much is needed and how much is free; or why else the disk cannot be written.
    """
    try:
        with full_disk_told(path, needed_bytes, what):
            yield
    except OSError as error:
        raise OutputError(f"{what or path}: cannot be written: {error.strerror or error}") from error


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; each as long as it is meant to be, if that was said."""
    return sum(file.stat().st_size for file in _files(path))


def free_bytes(path: Path) -> int:
    """Room on the disk of `path`, which need not exist yet; what it takes itself counts as room."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free + sum(file.stat().st_blocks * BLOCK for file in _files(path))


BLOCK = 512
"""The unit of `st_blocks` (POSIX), whatever the blocks of the disk."""


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    return [path] if path.is_file() else []


def settle(folder: Path) -> None:
    """Waits until all that was written in a folder is on the disk, so that a power cut after this loses none of it."""
    if os.name != "posix":  # elsewhere a folder cannot be asked to
        return
    for entry in [*folder.rglob("*"), folder]:
        if entry.is_symlink():
            continue
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
