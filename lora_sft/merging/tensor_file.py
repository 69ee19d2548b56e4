"""Safetensors files read by rows and written at offsets that are known in advance; never a whole tensor.

The safetensors package maps files into memory, which counts as memory in use; here each piece is read when it is
asked for. The format is its own: eight bytes with the length of a JSON header, the header, and the numbers.
"""

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import torch
from torch import Tensor

from lora_sft.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

PIECE_BYTES = 8 * 2**20
"""What is read, or copied, at a time."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        start: of its first byte in the file.
    """

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """All dimensions but the last; of a vector its length."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def columns(self) -> int:
        """The last dimension; 1 for a vector, whose every number is a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` as stored, (rows, columns); all of it in its own shape if nothing is named."""
        whole = start == 0 and stop is None
        stop = self.rows if stop is None else stop
        row_bytes = self.columns * self.dtype.itemsize
        buffer = bytearray((stop - start) * row_bytes)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + start * row_bytes)
            _fill(file, memoryview(buffer), self.name)
        flat = torch.frombuffer(buffer, dtype=self.dtype) if buffer else torch.empty(0, dtype=self.dtype)
        return flat.reshape(self.shape if whole else (stop - start, self.columns))


def _fill(file: BinaryIO, view: memoryview, name: str) -> None:
    """Reads until the buffer is full; a raw file may give less than was asked for."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise ModelError(f"{name}: its file ends before the tensor does; the file is cut off")
        done += count


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """A safetensors file → {name: where it lies}.

    Raises:
        ModelError: not a safetensors file, or one that was cut off.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size - 8:
                raise ValueError("the header does not end")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found = {
            name: StoredTensor(
                file, name, DTYPES[about["dtype"]], tuple(about["shape"]), 8 + length + about["data_offsets"][0]
            )
            for name, about in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: is no safetensors file that can be read: {error}") from None
    end = max((tensor.start + tensor.size for tensor in found.values()), default=0)
    if end > file.stat().st_size:
        raise ModelError(f"{file}: is cut off: {file.stat().st_size:,} of {end:,} bytes are there")
    return found


@dataclass(frozen=True)
class Planned:
    """A tensor that is about to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """One safetensors file, its header written first; then tensors in any order, also from several threads."""

    def __init__(self, file: Path, planned: Mapping[str, Planned]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts: dict[str, int] = {}
        end = 0
        for name, tensor in planned.items():
            header[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.size],
            }
            starts[name] = end
            end += tensor.size
        words = json.dumps(header, separators=(",", ":")).encode()
        words += b" " * (-len(words) % 8)  # the numbers begin at a multiple of 8
        first = 8 + len(words)
        self._starts = {name: first + start for name, start in starts.items()}
        self._missing, self._lock = first + end, Lock()
        self._file = file.open("wb", buffering=0)
        try:
            self._file.truncate(first + end)  # says how long it is meant to be, should the disk fill up
            self._put(memoryview(len(words).to_bytes(8, "little") + words), 0)
        except BaseException:
            self._file.close()
            raise

    def finish(self) -> None:
        """Sees to it that every byte is there and on the disk."""
        if self._missing:
            raise RuntimeError(f"{self._file.name}: {self._missing:,} bytes were not written")
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        """Lets the file go, finished or not."""
        self._file.close()

    def write(self, name: str, offset: int, rows: Tensor) -> None:
        """Rows of a tensor, of its dtype, at `offset` bytes from where it begins."""
        view = memoryview(rows.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._put(view, self._starts[name] + offset)

    def _put(self, view: memoryview, at: int) -> None:
        count = len(view)
        while view:
            done = os.pwrite(self._file.fileno(), view, at)
            view, at = view[done:], at + done
        self._count(count)

    def _count(self, written: int) -> None:
        with self._lock:
            self._missing -= written

    def copy(self, name: str, tensor: StoredTensor) -> None:
        """A tensor as it is stored elsewhere."""
        with tensor.file.open("rb", buffering=0) as source:
            start, target, end = tensor.start, self._starts[name], tensor.size
            done = 0
            while done < end:
                count = min(PIECE_BYTES, end - done)
                copied = self._copy_inside(source, start + done, target + done, count)
                if not copied:
                    source.seek(start + done)
                    piece = source.read(count)
                    if not piece:
                        raise ModelError(f"{tensor.file}: ends before {tensor.name} does; the file is cut off")
                    self._put(memoryview(piece), target + done)
                    copied = len(piece)
                done += copied

    def _copy_inside(self, source: BinaryIO, at: int, target: int, count: int) -> int:
        """Has the system copy bytes without a way through this process; 0 if it cannot."""
        try:
            copied = os.copy_file_range(source.fileno(), self._file.fileno(), count, at, target) if CAN_COPY else 0
        except OSError as error:
            if error.errno in CANNOT_COPY:
                return 0
            raise
        self._count(copied)
        return copied


CAN_COPY = hasattr(os, "copy_file_range")  # Linux alone
CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""From another disk, on a file system that cannot do it, or forbidden."""
