"""Whatever a person calls a dataset becomes rows that know where they came from."""

import gzip

import datasets
import pyarrow
import pytest

from lora_sft.data.sources import read_rows
from lora_sft.errors import DataError

ROW = {"messages": [{"role": "user", "content": "hi"}]}


def sources(dataset, **options) -> list[str]:
    return [row.source for row in read_rows(dataset, **options)]


def test_a_line_of_jsonl_knows_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n\n{"x": 2}\n')
    assert [(row.value, row.source) for row in read_rows(tmp_path / "a.jsonl")] == [
        ({"x": 1}, "a.jsonl:1"),
        ({"x": 2}, "a.jsonl:3"),
    ]


def test_json_holds_a_list_of_rows_each_with_its_line_or_number(tmp_path):
    (tmp_path / "a.json").write_text('[{"x": 1}, {"x": 2},\n {"x": 3}\n]')
    assert sources(tmp_path / "a.json") == ["a.json:1", "a.json[2]", "a.json:2"]
    assert [row.value for row in read_rows(tmp_path / "a.json")] == [{"x": 1}, {"x": 2}, {"x": 3}]
    (tmp_path / "a.json").write_text(" [ ] ")
    assert sources(tmp_path / "a.json") == []


def test_values_keep_the_type_that_they_have_in_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": "2024-01-01", "y": "001", "z": 12345678901234567890}\n')
    assert next(read_rows(tmp_path / "a.jsonl")).value == {"x": "2024-01-01", "y": "001", "z": 12345678901234567890}


def test_csv_values_are_the_text_in_the_file(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n001,NA\n2024-01-01,\n")
    assert [row.value for row in read_rows(tmp_path / "a.csv")] == [
        {"x": "001", "y": "NA"},
        {"x": "2024-01-01", "y": ""},
    ]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"x": 1}\n')
    assert next(read_rows(tmp_path / "a.jsonl")).value == {"x": 1}


def test_a_folder_is_all_its_files(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"x": 2}\n')
    (tmp_path / "a.json").write_text('[{"x": 1}]')
    (tmp_path / "notes.txt").write_text("no data")
    assert sources(tmp_path) == ["a.json:1", "b.jsonl:1"]


def test_parquet_and_datasets_objects_are_read(tmp_path):
    table = datasets.Dataset.from_list([ROW, ROW])
    table.to_parquet(tmp_path / "a.parquet")
    for given in (
        tmp_path / "a.parquet",
        table,
        datasets.DatasetDict({"train": table}),
        table.to_iterable_dataset(),
        [ROW, ROW],
    ):
        assert [row.value for row in read_rows(given)] == [ROW, ROW]


def test_arguments_from_a_table_get_no_invented_nulls(tmp_path):
    rows = [{"arguments": {"x": 1}}, {"arguments": {"y": "z"}}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert [row.value for row in read_rows(tmp_path / "a.parquet")] == rows
    assert [row.value for row in read_rows(datasets.Dataset.from_list(rows))] == rows


def test_a_hub_name_may_have_a_dot(monkeypatch):
    monkeypatch.setattr("lora_sft.data.sources._from_hub", lambda name, split: [{"name": name, "split": split}])
    (row,) = read_rows("teknium/OpenHermes-2.5")
    assert row.value == {"name": "teknium/OpenHermes-2.5", "split": "train"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[\n{"x": 1},\n]', r"a.json:3: no valid JSON"),
        ("a.json", b'[{"x": 1}', r"a.json:1: no valid JSON"),
        ("a.json", b'[{"x": 1},', r"is not closed: the file is cut off"),
        ("a.json", b'{"x": 1}', r"does not begin with \[; a .json file holds a list"),
        ("a.json", b'["\xff"]', r"a.json: byte 3 is not UTF-8"),
        ("a.json", b"[" * 100_000, r"a.json:1: no valid JSON"),
        ("a.parquet", b"nonsense", r"cannot be read"),
        ("a.arrow", b"nonsense", r"cannot be read"),
        ("a.jsonl.gz", b"nonsense", r"cannot be read"),
        ("a.txt", b"hello", r"unknown kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \n{"x": 3}\n', "a.jsonl:2: no valid JSON at column 6"),
        ("a.jsonl", b'{"x": 1}\n{"x": "\xff"}\n{"x": 3}\n', "a.jsonl:2: byte 8 is not UTF-8; save the file as UTF-8"),
        ("a.jsonl", b'{"x": 1}\n' + b"[" * 100_000 + b'\n{"x": 3}\n', "a.jsonl:2: is nested too deeply"),
        ("a.csv", b'x\n1\n"2,2",3\n3\n', "a.csv:3: has 2 values for 1 columns"),
        ("a.csv", b"x\n1\n\xff\n3\n", "a.csv:3: byte 1 is not UTF-8"),
    ],
)
def test_a_broken_row_is_told_with_its_place_and_the_others_are_read(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    rows = list(read_rows(tmp_path / name))
    assert [str(row.problem).startswith(words) for row in rows] == [False, True, False]
    assert [str(row.value["x"]) for row in (rows[0], rows[2])] == ["1", "3"]


def test_a_csv_value_may_hold_line_breaks(tmp_path):
    (tmp_path / "a.csv").write_text('x,y\n"one\ntwo",2\n3,4\n')
    assert [(row.value, row.source) for row in read_rows(tmp_path / "a.csv")] == [
        ({"x": "one\ntwo", "y": "2"}, "a.csv:2"),
        ({"x": "3", "y": "4"}, "a.csv:4"),
    ]


def test_a_quote_that_is_never_closed_is_told_and_swallows_nothing_in_silence(tmp_path):
    (tmp_path / "a.csv").write_text('x,y\n1,2\n3,"open\n5,6\n')
    first, second = read_rows(tmp_path / "a.csv")
    assert (first.value, first.problem) == ({"x": "1", "y": "2"}, None)
    assert str(second.problem).startswith("a.csv:3: no valid CSV from here to line 4")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_header_of_a_csv_tells_what_separates_values(tmp_path, separator):
    (tmp_path / "a.csv").write_text(f"x{separator}y\n1{separator}2\n")
    assert [row.value for row in read_rows(tmp_path / "a.csv")] == [{"x": "1", "y": "2"}]


def test_a_table_in_another_encoding_is_told(tmp_path):
    (tmp_path / "a.csv").write_bytes("x,y\n1,2\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.csv:1: is UTF-16; save the file as UTF-8"):
        list(read_rows(tmp_path / "a.csv"))


def test_compressed_files_are_read(tmp_path):
    lines = b'{"x": 1}\n{"x": 2}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.jsonl.zst").write_bytes(pyarrow.compress(lines, codec="zstd", asbytes=True))
    assert sources(tmp_path) == ["a.jsonl.gz:1", "a.jsonl.gz:2", "b.jsonl.zst:1", "b.jsonl.zst:2"]


def test_a_glob_is_all_that_it_matches(tmp_path):
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"x": 1}\n')
    assert sources(str(tmp_path / "a*.jsonl")) == ["a1.jsonl:1", "a2.jsonl:1"]
    with pytest.raises(DataError, match="no file matches"):
        sources(str(tmp_path / "c*.jsonl"))


def test_a_file_in_a_subfolder_is_told_by_its_path(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text('{"x": 1}\n')
    assert sources(tmp_path) == ["sub/a.jsonl:1"]


def test_what_datasets_saved_is_read(tmp_path):
    table = datasets.Dataset.from_list([{"x": 1}, {"x": 2}])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    assert [row.value["x"] for row in read_rows(tmp_path / "one")] == [1, 2]
    assert [row.value["x"] for row in read_rows(tmp_path / "two", "test")] == [2]
    (file,) = (tmp_path / "one").glob("*.arrow")
    assert [row.value["x"] for row in read_rows(file)] == [1, 2]


@pytest.mark.parametrize("missing", ["missing.jsonl", "./missing", "/missing/folder"])
def test_a_missing_file_is_told(missing):
    with pytest.raises(DataError, match="no such file or folder"):
        list(read_rows(missing))


def test_an_unknown_split_is_told():
    table = datasets.DatasetDict({"train": datasets.Dataset.from_list([ROW])})
    with pytest.raises(DataError, match="'test' is not among train"):
        list(read_rows(table, split="test"))
