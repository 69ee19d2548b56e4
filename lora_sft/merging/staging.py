"""A folder that bears its final name only when it is complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lora_sft.errors import OutputError, VerificationError
from lora_sft.model.disk import free_bytes, settle, writing


@contextmanager
def staged(output: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """An empty folder beside `output`, which takes that name when the block ends and all of it is on the disk.

    A VerificationError leaves the folder as `output.refused`; any other error leaves nothing. What a killed process
    left is cleared away.

    Args:
        needed_bytes: what will be written, to be told if the disk has no room.

    Raises:
        OutputError: the name is taken, somebody else is writing it, or the disk is full or cannot be written.
    """
    refuse_used(output)
    part = output.with_name(f".{output.name}.part")
    with _alone(output):
        try:
            with writing(part, needed_bytes, str(output)):
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                yield part
                settle(part)
                if output.is_dir():
                    output.rmdir()
                part.rename(output)
        except VerificationError as error:
            refused = output.with_name(f"{output.name}.refused")
            shutil.rmtree(refused, ignore_errors=True)
            part.rename(refused)
            raise VerificationError(f"{error}; kept as {refused}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Holds a lock beside `output`; that of a dead process is none."""
    with writing(output.parent, what=str(output)):
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise OutputError(f"{output}: another process is writing it; name another folder") from None
    try:
        yield
    finally:
        # The name goes first: whoever opened this file meanwhile gets no second lock beside a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def refuse_used(output: Path) -> None:
    """Raises OutputError if something lies under this name, or it is inside a model; an empty folder is welcome."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists already; name another folder")
    for folder in output.resolve().parents:
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            raise OutputError(f"{output}: lies inside the model {folder}, which is left as it is; name another folder")


def check_room(output: Path, needed_bytes: int) -> None:
    """Raises OutputError if the disk has less than `needed_bytes` left."""
    free = free_bytes(output)
    if free < needed_bytes:
        raise OutputError(
            f"{output}: {needed_bytes / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free; make room, or name "
            "a folder on another disk"
        )
