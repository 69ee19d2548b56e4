"""Examples on disk: written one after the other, read through a memory map, so that any number of them fits.

One Arrow file holds the tokens and labels of all of them. `Examples` reads like a list; a selection of it, in any order
and with repetitions, is another one on the same file.
"""

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lora_sft.chat.labels import Example

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("source", pa.string()),
        ("length", pa.int32()),
        ("learned", pa.int32()),
        ("conversation", pa.int64()),
        ("words", pa.string()),
    ]
)
BATCH = 1000
"""So many examples are written at once, and held in memory until then."""


def temporary_file() -> Path:
    """A file that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="lora_sft-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / "examples.arrow"


class ExampleWriter:
    """Writes examples to a file. A context manager."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._waiting: list[dict[str, Any]] = []

    def __enter__(self) -> "ExampleWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
        finally:
            self._sink.close()

    def add(self, example: Example, conversation: int, words: str = "") -> None:
        """Adds one.

        Args:
            conversation: number of the conversation that it came from; several may come from one.
            words: what its near-duplicates are found by; empty if nobody looks for them.
        """
        self._waiting.append(
            {
                "input_ids": example.input_ids,
                "labels": example.labels,
                "source": example.source,
                "length": len(example.input_ids),
                "learned": example.supervised_tokens,
                "conversation": conversation,
                "words": words,
            }
        )
        if len(self._waiting) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            columns = {name: [row[name] for row in self._waiting] for name in SCHEMA.names}
            self._writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
            self._waiting = []


class Examples(Sequence[Example]):
    """Examples of a file, in the order of `indices`; read when they are asked for.

    Attributes:
        path: the file.
        indices: which of them, (count).
        lengths: tokens of each, (count).
        learned: supervised tokens of each, (count).
        conversations: number of the conversation that each came from, (count).
    """

    def __init__(self, path: Path, indices: NDArray[np.int64] | None = None) -> None:
        self.path = path
        with pa.memory_map(str(path)) as mapped:
            self._table = pa.ipc.open_file(mapped).read_all()
        self._chunks: dict[tuple[str, int], tuple[NDArray[np.int32], NDArray[np.int32]]] = {}
        self.indices = np.arange(self._table.num_rows) if indices is None else indices
        self.lengths = self._numbers("length")
        self.learned = self._numbers("learned")
        self.conversations = self._numbers("conversation")

    def _numbers(self, column: str) -> NDArray[np.int64]:
        whole: NDArray[np.int64] = self._table.column(column).to_numpy()
        return whole[self.indices]

    def select(self, places: Iterable[int]) -> "Examples":
        """Those at the given places of this sequence, in that order."""
        return Examples(self.path, self.indices[np.fromiter(places, dtype=np.int64)])

    def arrays(self, place: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(tokens, labels) of the example at a place, each (length,): the memory map itself, and not to be written to.

        Ten times as fast as the lists of an `Example`, for whoever makes tensors of them.
        """
        chunk, row = divmod(int(self.indices[place]), BATCH)
        (tokens, starts), (labels, _) = self._flat("input_ids", chunk), self._flat("labels", chunk)
        return tokens[starts[row] : starts[row + 1]], labels[starts[row] : starts[row + 1]]

    def _flat(self, column: str, chunk: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(all numbers of a column's chunk end to end, where each row begins and the last ends)."""
        if (column, chunk) not in self._chunks:
            lists = self._table.column(column).chunk(chunk)
            self._chunks[column, chunk] = lists.values.to_numpy(), lists.offsets.to_numpy()
        return self._chunks[column, chunk]

    def words(self) -> list[str]:
        """What near-duplicates are found by."""
        return [self._table.column("words")[int(index)].as_py() for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, key: int) -> Example: ...

    @overload
    def __getitem__(self, key: slice) -> list[Example]: ...

    def __getitem__(self, key: int | slice) -> Example | list[Example]:
        if isinstance(key, slice):
            return [self._read(int(index)) for index in self.indices[key]]
        return self._read(int(self.indices[key]))

    def __iter__(self) -> Iterator[Example]:
        return (self._read(int(index)) for index in self.indices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Example.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type["Examples"], tuple[Path, NDArray[np.int64]]]:
        return Examples, (self.path, self.indices)

    def _read(self, index: int) -> Example:
        row = self._table.slice(index, 1).to_pydict()
        return Example(row["input_ids"][0], row["labels"][0], source=row["source"][0])
