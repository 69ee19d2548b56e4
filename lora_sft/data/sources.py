"""What a person calls a dataset (path, hub name, list, `datasets` object) → rows, each with its origin.

JSON and JSONL are read with the standard library, so that values keep the type they have in the file and
every row knows its line; CSV and Parquet are read by pyarrow, hub datasets by `datasets`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_sft.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row as it stands in the source, and where: `chats.jsonl:12`."""

    value: Any
    source: str


def read_rows(dataset: Any, split: str = "train") -> Iterator[Row]:
    """All rows of a dataset, in order.

    Args:
        dataset: a .json, .jsonl, .csv or .parquet file, a folder of them, a hub name, a list of dicts, or a
            `datasets.Dataset`, `DatasetDict` or `IterableDataset`.
        split: which split of a hub dataset or `DatasetDict`.

    Raises:
        DataError: nothing there, or a file that cannot be read (with line and column).
    """
    if isinstance(dataset, (str, Path)):
        yield from _read_path_or_hub(str(dataset), split)
    elif isinstance(dataset, (list, tuple)):
        for number, value in enumerate(dataset, start=1):
            yield Row(value, f"row {number}")
    else:
        yield from _read_datasets(dataset, split, "row ")


def _read_path_or_hub(name: str, split: str) -> Iterator[Row]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise DataError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
        for file in files:
            yield from _read_file(file)
    elif path.is_file():
        yield from _read_file(path)
    elif path.suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise DataError(f"{name}: no such file or folder (looked in {Path.cwd()})")
    else:
        yield from _read_datasets(_from_hub(name, split), split, f"{name}:")


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif path.suffix == ".json":
        yield from _read_json(path)
    elif path.suffix in (".csv", ".parquet"):
        yield from _read_table(path)
    else:
        raise DataError(f"{path}: unknown kind of file; use {', '.join(SUFFIXES)}")


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield Row(_parse(line, f"{path.name}:{number}"), f"{path.name}:{number}")


def _read_json(path: Path) -> Iterator[Row]:
    content = _parse(_text(path), path.name)
    if not isinstance(content, list):
        raise DataError(
            f"{path}: holds one {type(content).__name__}; a .json file holds a list of rows, a .jsonl file one row a "
            "line"
        )
    for number, value in enumerate(content, start=1):
        yield Row(value, f"{path.name}[{number}]")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _parse(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"{source}:{error.lineno}" if "\n" in text else source
        raise DataError(f"{line}: no valid JSON at column {error.colno}: {error.msg}") from None


def _read_table(path: Path) -> Iterator[Row]:
    """CSV (every value as the text in the file) and Parquet, read by pyarrow."""
    from pyarrow import ArrowInvalid, csv, parquet

    try:
        if path.suffix == ".csv":
            names = csv.open_csv(path).schema.names
            table = csv.read_csv(
                path,
                convert_options=csv.ConvertOptions(
                    column_types=dict.fromkeys(names, "string"), strings_can_be_null=False
                ),
            )
        else:
            table = parquet.read_table(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    for number, value in enumerate(table.to_pylist(), start=1):
        yield Row(without_nulls(value), f"{path.name}[{number}]")


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
