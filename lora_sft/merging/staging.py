"""A folder that bears its final name only when it is complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_sft.errors import OutputError, VerificationError


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, which takes that name when the block ends.

    A VerificationError leaves the folder as `output.refused`; any other error leaves nothing.

    Raises:
        OutputError: the name is taken, or the disk cannot be written.
    """
    refuse_used(output)
    part = output.with_name(f".{output.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if output.is_dir():
            output.rmdir()
        part.rename(output)
    except VerificationError as error:
        refused = output.with_name(f"{output.name}.refused")
        shutil.rmtree(refused, ignore_errors=True)
        part.rename(refused)
        raise VerificationError(f"{error}; kept as {refused}") from None
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_used(output: Path) -> None:
    """Raises OutputError if something lies under this name; an empty folder is welcome."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists already; name another folder")


def check_room(output: Path, needed_bytes: int) -> None:
    """Raises OutputError if the disk has less than `needed_bytes` left."""
    there = output
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise OutputError(
            f"{output}: {needed_bytes / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free; make room, or name "
            "a folder on another disk"
        )
