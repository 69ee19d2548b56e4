"""A merged model → a folder that transformers loads; memory stays flat however large the model is."""

import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from lora_sft.console import console, is_main_process
from lora_sft.merging.base_files import INDEX, WEIGHTS
from lora_sft.merging.merged import MergedModel
from lora_sft.merging.tensor_file import Planned, TensorWriter

WRITERS = 2
"""Threads that write: copying into the system's cache takes longer than computing."""


def written_bytes(merged: MergedModel, dtype: str) -> int:
    """What the weights take on disk."""
    wanted = getattr(torch, dtype)
    return sum(math.prod(shape) * merged.dtype_of(name, wanted).itemsize for name, shape in merged.shapes.items())


def write_model(merged: MergedModel, folder: Path, dtype: str) -> None:
    """Weights and small files → `folder`, in the shards of the base; a progress bar goes along.

    Args:
        dtype: of the weights: bfloat16, float16 or float32.
    """
    wanted = getattr(torch, dtype)
    shards: dict[str, dict[str, Planned]] = defaultdict(dict)
    for name, shape in merged.shapes.items():
        file = merged.base.stored[name].file.name
        shards[file][name] = Planned(merged.dtype_of(name, wanted), shape)
    total = sum(tensor.size for planned in shards.values() for tensor in planned.values())
    with bar_of_bytes("writing", total) as advance, ThreadPoolExecutor(WRITERS) as pool, ExitStack() as opened:
        finishing = []
        for file, planned in shards.items():
            writer = TensorWriter(folder / file, planned)
            opened.callback(writer.close)
            with _Line(pool) as line:
                for name, tensor in planned.items():
                    _write_tensor(merged, name, tensor, writer, line)
                    advance(tensor.size)
            finishing.append(pool.submit(writer.finish))  # the disk takes its time; the next shard need not wait
        for one in finishing:
            one.result()
    if list(shards) != [WEIGHTS]:
        places = {name: file for file, planned in shards.items() for name in planned}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    merged.write_small_files(folder, dtype)


def _write_tensor(merged: MergedModel, name: str, tensor: Planned, writer: TensorWriter, line: "_Line") -> None:
    stored = merged.base.stored[name]
    if merged.is_as_stored(name) and stored.dtype == tensor.dtype:
        line.put(writer.copy, name, stored)
        return
    offset = 0
    for rows in merged.pieces(name):
        rows = rows.to(tensor.dtype)
        line.put(writer.write, name, offset, rows)
        offset += rows.nbytes


class _Line:
    """What is to be written, in threads of its own while the next rows are computed."""

    WAITING = WRITERS + 1
    """Pieces that may wait, so that memory stays flat."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._waiting: deque[Future[None]] = deque()

    def put(self, write: Callable[..., None], *given: object) -> None:
        """Has `write` called; raises what an earlier one raised."""
        self._waiting.append(self._pool.submit(write, *given))
        while len(self._waiting) > self.WAITING:
            self._waiting.popleft().result()

    def __enter__(self) -> "_Line":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        while self._waiting:
            waiting = self._waiting.popleft()
            if kind is None:
                waiting.result()
            else:
                waiting.cancel()


@contextmanager
def bar_of_bytes(doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, moved on by calling what is yielded; silent where nobody watches."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    watched = is_main_process() and console().is_terminal
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(doing), *columns, console=console(), transient=True, disable=not watched) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda count: bar.advance(task, count)
