"""What a person calls a dataset (path, glob, hub name, list, `datasets` object) → rows, each with its origin.

Everything is read a row at a time. JSON and JSONL are read with the standard library, so that values keep the type they
have in the file; CSV too, every value as the text that stands there; Parquet and Arrow by pyarrow; hub datasets by
`datasets`. A row that cannot be read is a row with a problem: whoever reads decides what becomes of it.
"""

import csv
import glob
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from lora_sft.data.problems import Problem
from lora_sft.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row as it stands in the source, and where: `chats.jsonl:12`.

    Attributes:
        problem: why it cannot be read; `value` is then what is known of it, or None.
    """

    value: Any
    source: str
    problem: Problem | None = None


def read_rows(dataset: Any, split: str = "train") -> Iterator[Row]:
    """All rows of a dataset, in order, read as they are asked for.

    Args:
        dataset: a file (SUFFIXES, also compressed), a folder of them, a glob, a folder that `datasets` saved, a hub
            name, a list or another iterable of dicts, or a `datasets` object.
        split: which split of a hub dataset or `DatasetDict`.

    Raises:
        DataError: nothing there, or a file that cannot be opened.
    """
    if isinstance(dataset, (str, Path)):
        yield from _read_path_or_hub(str(dataset), split)
    elif isinstance(dataset, (list, tuple)):
        for number, value in enumerate(dataset, start=1):
            yield Row(value, f"row {number}")
    else:
        yield from _read_datasets(dataset, split, "row ")


def files_of(name: str) -> list[Path] | None:
    """The files that a path or glob stands for, in order; None if it is no path but a hub name.

    Raises:
        DataError: it is a path, and nothing is there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        # A link that leads nowhere is no file; it is listed, so that reading it tells.
        found = [file for file in path.rglob("*") if _kind(file) in READERS and (file.is_file() or file.is_symlink())]
        if not found:
            raise DataError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
        return sorted(found)
    if glob.has_magic(name):
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [Path(match) for match in matches if Path(match).is_file()]
        if not found:
            raise DataError(f"{name}: no file matches (looked in {Path.cwd()})")
        return found
    if _kind(path) in READERS or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise DataError(f"{name}: no such file or folder (looked in {Path.cwd()})")
    return None


def _read_path_or_hub(name: str, split: str) -> Iterator[Row]:
    path = Path(name).expanduser()
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        yield from _read_datasets(_from_disk(path), split, f"{path.name}:")
        return
    files = files_of(name)
    if files is None:
        yield from _read_datasets(_from_hub(name, split), split, f"{name}:")
        return
    for file in files:
        shown = file.relative_to(path).as_posix() if path.is_dir() else file.name
        is_empty = True
        for row in _read_file(file, shown):
            is_empty = False
            yield row
        if is_empty and len(files) > 1:
            raise DataError(f"{file}: holds no rows, unlike the other files; is it whole? Take it out if it is")


def _read_file(path: Path, shown: str) -> Iterator[Row]:
    reader = READERS.get(_kind(path))
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; use {', '.join(SUFFIXES)}")
    try:
        with _open(path) as stream:
            yield from reader(stream, shown)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _kind(path: Path) -> str:
    """`.jsonl` of `chats.jsonl` and of `chats.jsonl.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def _open(path: Path) -> BinaryIO:
    """A file as bytes, decompressed."""
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    import pyarrow

    packed = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), COMPRESSED[path.suffix.lower()])
    return io.BufferedReader(packed)


# --- text files ---------------------------------------------------------------------------------------------


def _read_jsonl(stream: BinaryIO, shown: str) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        source = f"{shown}:{number}"
        text, problem = _decoded(line, source, is_first=number == 1)
        if problem or text.strip():
            yield Row(None, source, problem) if problem else _parsed(text.rstrip(), source)


def _parsed(text: str, source: str) -> Row:
    try:
        return Row(_DECODER.decode(text), source)
    except json.JSONDecodeError as error:
        return Row(text, source, Problem(source, "", f"no valid JSON at column {error.colno}: {error.msg}", ONE_A_LINE))
    except _TwiceError as error:
        return Row(text, source, Problem(source, "", str(error), "one of the two would be lost: keep one"))
    except RecursionError:
        return Row(text, source, Problem(source, "", "is nested too deeply", "flatten it"))
    except ValueError as error:  # a number of over 4,300 digits
        return Row(text, source, Problem(source, "", f"no valid JSON: {error}", ONE_A_LINE))


ONE_A_LINE = "a .jsonl file holds one JSON object a line"


class _TwiceError(ValueError):
    """A key stands twice in an object; JSON does not say which of the two counts."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(f'"{next(name for name in names if names.count(name) > 1)}" stands twice in an object')
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _read_json(stream: BinaryIO, shown: str) -> Iterator[Row]:
    """A list of rows; each is made when it is asked for, so only the text is in memory."""
    text, problem = _decoded(stream.read(), shown, is_first=True)
    if problem:
        raise DataError(str(problem))
    line, counted = 1, 0
    position = _behind_space(text, 0)
    if text[position : position + 1] != "[":
        raise DataError(
            f"{shown}: does not begin with [; a .json file holds a list of rows, a .jsonl file one row a line"
        )
    position = _behind_space(text, position + 1)
    number = 0
    while text[position : position + 1] not in ("]", ""):
        before, line = line, line + text.count("\n", counted, position)
        counted, number = position, number + 1
        try:
            value, position = _DECODER.raw_decode(text, position)
            # Where several rows share a line, their number tells them apart.
            yield Row(value, f"{shown}:{line}" if line > before or number == 1 else f"{shown}[{number}]")
            position = _behind_space(text, position)
            if text[position : position + 1] == ",":
                position = _behind_space(text, position + 1)
                if text[position : position + 1] == "]":
                    raise json.JSONDecodeError("a comma behind the last row", text, position)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("expecting ',' or ']'", text, position)
        except (json.JSONDecodeError, RecursionError, ValueError) as error:
            # Where the next row would begin cannot be told any more.
            raise DataError(f"{shown}:{_where(error, line)}; the rest of the file cannot be read") from None
    if text[position : position + 1] != "]":
        raise DataError(f"{shown}: the list of rows is not closed: the file is cut off")
    behind = _behind_space(text, position + 1)
    if behind < len(text):
        line += text.count("\n", counted, behind)
        raise DataError(f"{shown}:{line}: something stands behind the list of rows; a .json file holds one list")


def _where(error: Exception, line: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.lineno}: no valid JSON at column {error.colno}: {error.msg}"
    return f"{line}: {error}" if isinstance(error, _TwiceError) else f"{line}: no valid JSON: {error}"


def _behind_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_csv(stream: BinaryIO, shown: str) -> Iterator[Row]:
    """Every value as the text in the file; a quoted one may hold line breaks. The header tells what separates them."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    number, problems = 0, []

    def lines() -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(stream, start=1):
            text, problem = _decoded(line, f"{shown}:{number}", is_first=number == 1)
            if problem:
                problems.append(problem)
            yield line.decode("utf-8", "replace") if problem else text

    text = lines()
    header = next(text, "")
    if problems:
        raise DataError(str(problems[0]))
    reader = csv.reader(chain([header], text), delimiter=max(",;\t", key=header.count), strict=True)
    names: list[str] | None = None
    while True:
        begins, problems = number + 1, []
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            source = f"{shown}:{begins}"
            fix = "a value in quotes ends with a quote, and a quote in it is doubled"
            yield Row(None, source, Problem(source, "", f"no valid CSV from here to line {number}: {error}", fix))
            continue
        if names is None:
            names = values
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise DataError(f"{shown}:1: the column {twice[0]!r} stands twice; one of the two would be lost")
        elif values:
            source = f"{shown}:{begins}"
            if not problems and len(values) != len(names):
                fix = "quote values that hold commas or line breaks"
                problems.append(Problem(source, "", f"has {len(values)} values for {len(names)} columns", fix))
            yield Row(dict(zip(names, values, strict=False)), source, problems[0] if problems else None)


def _decoded(line: bytes, source: str, is_first: bool = False) -> tuple[str, Problem | None]:
    """(text, None), or ("", why it is no text)."""
    if is_first and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "", Problem(source, "", "is UTF-16", "save the file as UTF-8")
    try:
        return (line.removeprefix(b"\xef\xbb\xbf") if is_first else line).decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", Problem(source, "", f"byte {error.start + 1} is not UTF-8", "save the file as UTF-8")


# --- tables and datasets ------------------------------------------------------------------------------------


def _read_parquet(stream: BinaryIO, shown: str) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        # Checksums are few writers' habit; where there are some, they are looked at.
        yield from _rows_of_batches(ParquetFile(stream, page_checksum_verification=True).iter_batches(), shown)
    except ArrowException as error:
        raise DataError(f"{shown}: cannot be read as Parquet: {error}") from None


def _read_arrow(stream: BinaryIO, shown: str) -> Iterator[Row]:
    from pyarrow import ArrowException, ipc

    try:
        if stream.read(6) == b"ARROW1":
            stream.seek(0)
            file = ipc.open_file(stream)
            batches: Iterable[Any] = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            stream.seek(0)
            batches = ipc.open_stream(stream)
        yield from _rows_of_batches(batches, shown)
    except ArrowException as error:
        raise DataError(f"{shown}: cannot be read as Arrow: {error}") from None


def _rows_of_batches(batches: Iterable[Any], shown: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged file may hold offsets that lead outside of it
        for value in batch.to_pylist():
            number += 1
            yield Row(without_nulls(value), f"{shown}[{number}]")


Reader = Callable[[BinaryIO, str], Iterator[Row]]

# A new kind of file: its function above, its line here.
READERS: dict[str, Reader] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
SUFFIXES = tuple(READERS)
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


def _from_disk(path: Path) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path))
    except Exception as error:  # whatever is wrong with the folder is told to the user
        raise DataError(f"{path}: was saved by `datasets`, and cannot be read: {error}") from None


def _from_hub(name: str, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many kinds; each is told to the user
        raise DataError(f"{name}: neither a file here nor a dataset that the hub gives us: {error}") from None


def _read_datasets(dataset: Any, split: str, prefix: str) -> Iterator[Row]:
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise DataError(f"dataset_split {split!r} is not among {', '.join(dataset)}")
        dataset = dataset[split]
    if not hasattr(dataset, "__iter__"):
        raise DataError(
            f"a dataset is a path, a hub name, a list of dicts or a datasets object, not {type(dataset).__name__}"
        )
    for number, value in enumerate(dataset, start=1):
        yield Row(without_nulls(value), f"{prefix}{number}")


def without_nulls(value: Any) -> Any:
    """A row of an Arrow table without its null fields: Arrow gives every struct the keys of all the others."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value
