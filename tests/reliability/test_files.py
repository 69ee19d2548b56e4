"""Broken files are told with file, line and column or the plain reason; the content of whole ones stays as it is."""

import csv
import gzip
import io
import json
import re

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from lora_sft.data.formats import to_conversation
from lora_sft.data.intake import Intake
from lora_sft.data.sources import Row, read_rows
from lora_sft.errors import DataError
from lora_sft.model.tokenizer import prepare_speech
from lora_sft.preparation.dataset import read_data
from lora_sft.settings import resolve
from tests.conftest import conversation

GOOD = json.dumps({"messages": conversation("hi", "yo")}).encode()
PACKED = gzip.compress(b"\n".join([GOOD] * 50))
ZIPPED = pa.compress(b"\n".join([GOOD] * 50), codec="zstd", asbytes=True)


def table(**columns):
    """A Parquet file."""
    stream = io.BytesIO()
    parquet.write_table(pa.table(columns), stream, write_page_checksum=True)
    return stream.getvalue()


def flipped(content, place):
    place = place % len(content)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


PARQUET = table(prompt=["question"] * 50, completion=[f"answer {n}" for n in range(50)])

BROKEN = {
    "cut off in a line": ("a.jsonl", GOOD + b"\n" + GOOD[:40], r"a.jsonl:2: no valid JSON at column \d+: "),
    "a comma too many": ("a.jsonl", b'{"text": "a",}\n' + GOOD, r"a.jsonl:1: no valid JSON at column \d+: "),
    "two rows on a line": ("a.jsonl", GOOD + GOOD, r"a.jsonl:1: no valid JSON at column \d+: Extra data"),
    "a list in JSONL": ("a.jsonl", b"[" + GOOD + b"]", r"a.jsonl:1: is list, not an object"),
    "Latin-1": ("a.jsonl", GOOD + b'\n{"text": "caf\xe9"}', r"a.jsonl:2: byte 14 is not UTF-8; save the file as UTF-8"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), r"a.jsonl:1: is UTF-16; save the file as UTF-8"),
    "UTF-16 without a mark": ("a.jsonl", GOOD.decode().encode("utf-16-le"), r"a.jsonl:1: no valid JSON at column 2"),
    "nested without end": ("a.jsonl", b"[" * 100_000, r"a.jsonl:1: is nested too deeply"),
    "a number without end": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"a.jsonl:1: no valid JSON: .*digit"),
    "an empty file": ("a.jsonl", b"", r"the dataset is empty"),
    "blank lines alone": ("a.jsonl", b"\n \n\t\n", r"the dataset is empty"),
    "a list that is not closed": ("a.json", b"[" + GOOD, r"a.json:1: no valid JSON at column \d+: "),
    "a list that breaks off": ("a.json", b"[\n" + GOOD + b",\n", r"is not closed: the file is cut off"),
    "a comma behind the last": ("a.json", b"[\n" + GOOD + b",\n]", r"a.json:3: no valid JSON at column 1"),
    "two lists": ("a.json", b"[" + GOOD + b"]\n[" + GOOD + b"]", r"a.json:2: something stands behind the list of rows"),
    "an object in JSON": ("a.json", b'{"data": [' + GOOD + b"]}", r"does not begin with \[; a .json file holds a list"),
    "an empty JSON": ("a.json", b"", r"does not begin with \["),
    "a key twice in JSON": ("a.json", b'[\n{"text": "a", "text": "b"}]', r'a.json:2: "text" stands twice in an object'),
    "a header alone": ("a.csv", b"prompt,completion\n", r"the dataset is empty"),
    "a value too many": ("a.csv", b"prompt,completion\na,b\na,b,c\n", r"a.csv:3: has 3 values for 2 columns"),
    "a value too few": ("a.csv", b"prompt,completion\na\n", r"a.csv:2: has 1 values for 2 columns"),
    "a quote left open": ("a.csv", b'prompt,completion\na,"b\nc,d\n', r"a.csv:2: no valid CSV from here to line 3"),
    "text behind a quote": ("a.csv", b'prompt,completion\n"a"b,c\n', r"a.csv:2: no valid CSV"),
    "a column twice": ("a.csv", b"prompt,completion,prompt\na,b,c\n", r"a.csv:1: the column 'prompt' stands twice"),
    "a CSV in Latin-1": ("a.csv", b"prompt,completion\na,caf\xe9\n", r"a.csv:2: byte 6 is not UTF-8"),
    "a CSV in UTF-16": ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), r"a.csv:1: is UTF-16"),
    "no Parquet": ("a.parquet", b"PAR1 or not", r"a.parquet: cannot be read as Parquet: .+"),
    "half a Parquet": ("a.parquet", PARQUET[: len(PARQUET) // 2], r"a.parquet: cannot be read as Parquet: .+"),
    "a bit in a Parquet": ("a.parquet", flipped(PARQUET, 30), r"a.parquet: cannot be read.*: .+"),
    "an empty Parquet": ("a.parquet", b"", r"a.parquet: cannot be read as Parquet: .+ 0 bytes"),
    "a Parquet without rows": ("a.parquet", table(prompt=[], completion=[]), r"the dataset is empty"),
    "no Arrow": ("a.arrow", b"ARROW1 or not", r"a.arrow: cannot be read as Arrow: .+"),
    "half a gzip": ("a.jsonl.gz", PACKED[:-9], r"a.jsonl.gz: cannot be read: Truncated compressed stream"),
    "a bit in a gzip": ("a.jsonl.gz", flipped(PACKED, -7), r"a.jsonl.gz: cannot be read: .+incorrect data check"),
    "no gzip": ("a.jsonl.gz", GOOD, r"a.jsonl.gz: cannot be read: .+incorrect header"),
    "half a zstd": ("a.jsonl.zst", ZIPPED[:-5], r"a.jsonl.zst: cannot be read: Truncated compressed stream"),
    "another kind": ("a.xlsx", b"PK", r"a.xlsx: unknown kind of file; use .json, .jsonl"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_told(kind, tmp_path, tokenizer):
    name, content, words = BROKEN[kind]
    (tmp_path / name).write_bytes(content)
    config = resolve({"dataset": str(tmp_path / name), "data_cache": "off"})
    with pytest.raises(DataError) as refused:
        read_data(config, prepare_speech(tokenizer))
    assert re.search(words, str(refused.value)), refused.value


def folder_of(place, **files):
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name.replace("_", ".")).write_bytes(content)
    return place


PLACES = {
    "nothing there": (lambda place: place / "a.jsonl", "no such file or folder"),
    "an empty folder": (lambda place: folder_of(place / "x"), r"no .json, .*file in this folder"),
    "a folder of other files": (lambda place: folder_of(place / "x", a_txt=GOOD), r"no .json, .*file in this folder"),
    "a folder called like a file": (lambda place: folder_of(place / "a.jsonl"), r"no .json, .*file in this folder"),
    "an empty file among others": (
        lambda place: folder_of(place / "x", a_jsonl=GOOD, b_jsonl=b""),
        r"b.jsonl: holds no rows, unlike the other files",
    ),
    "a broken file among others": (
        lambda place: folder_of(place / "x", a_jsonl=GOOD, b_json=b"[1"),
        r"b.json:1: no valid JSON",
    ),
    "a glob without a match": (lambda place: place / "*.jsonl", "no file matches"),
    "a folder that datasets did not finish": (
        lambda place: folder_of(place / "x", state_json=b"{}"),
        "was saved by `datasets`, and cannot be read",
    ),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_place_without_data_is_told(kind, tmp_path, tokenizer):
    make, words = PLACES[kind]
    with pytest.raises(DataError, match=words):
        read_data(resolve({"dataset": str(make(tmp_path)), "data_cache": "off"}), prepare_speech(tokenizer))


def test_a_link_that_leads_nowhere_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"b.jsonl: cannot be read: .*No such file"):
        list(read_rows(tmp_path))


# --- content that looks like something else -------------------------------------------------------------------

TEXTS = [
    *("2024-01-31", "2024-01-31T10:00:00Z", "10:30", "1/2/2024", "Jan 5", "001", "+1", "1e5", "1E400", "0x1F", "1_000"),
    *("NA", "N/A", "nan", "NaN", "null", "NULL", "None", "true", "FALSE", "yes", "inf", "-Infinity", "-", "~", "=1+1"),
    *("12345678901234567890", "0.1000000000000000055511151231257827", "1.10", "1,5", "a;b", 'say "hi"', "[1]", "{}"),
    *("two\nlines", "tab\there", " spaces around ", "é", "e\u0301", "𝔘\u200d\ufeff", "a\u2028b", "<null>", "\\n", "#5"),
]


def write(layout, kind, path):
    """The texts as answers, in a file as a person would have it."""
    columns = {"alpaca": ("instruction", "output"), "prompt-completion": ("prompt", "completion")}
    if layout == "messages":
        rows = [{"messages": conversation("q", text)} for text in TEXTS]
    elif layout == "sharegpt":
        rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]} for text in TEXTS]
    elif layout == "text":
        rows = [{"text": text} for text in TEXTS]
    else:
        question, answer = columns[layout]
        rows = [{question: "q", answer: text} for text in TEXTS]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("layout", ["messages", "sharegpt", "alpaca", "prompt-completion", "text"])
def test_the_text_trained_on_is_the_text_in_the_file(layout, kind, tmp_path, tokenizer):
    path = write(layout, kind, tmp_path / f"a.{kind}")
    config = resolve({"dataset": str(path), "data_cache": "off"})
    found = read_data(config, prepare_speech(tokenizer)).train.examples
    learned = [tokenizer.decode([label for label in one.labels if label != -100]) for one in found]
    assert learned == [f"{text}<|im_end|>" for text in TEXTS]


@pytest.mark.parametrize("value", [1, 1.5, True, 10**20, ["a"], {"a": 1}], ids=repr)
@pytest.mark.parametrize("layout", ["messages", "sharegpt", "alpaca", "prompt-completion", "text"])
def test_a_value_that_is_no_text_is_refused_not_printed(layout, value):
    row = {
        "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": value}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": value}]},
        "alpaca": {"instruction": "q", "output": value},
        "prompt-completion": {"prompt": "q", "completion": value},
        "text": {"text": value},
    }[layout]
    intake = Intake()
    assert list(intake.conversations([Row(row, "a:1")])) == []
    assert intake.grave == 1


def test_a_table_whose_texts_became_dates_or_numbers_is_refused(tmp_path):
    """As pandas and `datasets` make of a column in which every answer is a date."""
    import datetime

    for value in (datetime.datetime(2024, 1, 31), datetime.date(2024, 1, 31), 7, 1.5, True):
        parquet.write_table(pa.table({"prompt": ["q"], "completion": [value]}), tmp_path / "a.parquet")
        for given in (tmp_path / "a.parquet", datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"))):
            with pytest.raises(DataError, match=rf"completion: is {type(value).__name__}|completion: is datetime"):
                [to_conversation(row) for row in read_rows(given)]
