"""Tool schemas and arguments reach the template as the JSON that went in, by whatever path."""

import csv
import json

import datasets
import pytest

from lora_sft.data.formats import to_conversation
from lora_sft.data.sources import read_rows

WHOLE_NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": WHOLE_NUMBER}},
    {"type": "function", "function": {"name": "say", "parameters": {"type": "object", "required": ["words"]}}},
]
ARGUMENTS = [{"a": 1, "b": [2, 3.5]}, {"words": "2024-01-01"}, {}, {"deep": {"x": True, "y": {"z": ["", "é"]}}}]


def rows():
    """A row for each set of arguments: no two have the same keys."""
    for arguments in ARGUMENTS:
        call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1"},
        ]
        yield {"messages": messages, "tools": TOOLS}


def as_text(row):
    """Messages and tools as JSON in a string, as tables hold them."""
    return {name: json.dumps(value) for name, value in row.items()}


def write(kind, folder):
    """Rows in a file or object of a kind, as a user would have them."""
    path = folder / f"rows.{kind.partition(' ')[0]}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows())))
    elif kind == "json":
        path.write_text(json.dumps(list(rows()), indent=1))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["messages", "tools"])
            writer.writeheader()
            writer.writerows(map(as_text, rows()))
    elif kind == "parquet":
        datasets.Dataset.from_list(list(rows())).to_parquet(path)
    elif kind == "parquet of text":
        datasets.Dataset.from_list(list(map(as_text, rows()))).to_parquet(path)
    elif kind == "a list":
        return list(rows())
    elif kind == "a stream":
        return datasets.IterableDataset.from_generator(rows)
    else:
        table = datasets.Dataset.from_list(list(rows()))
        return table if kind == "a Dataset" else datasets.DatasetDict({"train": table})
    return path


@pytest.mark.parametrize(
    "kind",
    ["jsonl", "json", "csv", "parquet", "parquet of text", "a list", "a stream", "a Dataset", "a DatasetDict"],
)
def test_tools_stay_what_they_were(kind, tmp_path):
    found = [to_conversation(row) for row in read_rows(write(kind, tmp_path))]
    assert [one.messages[1]["tool_calls"][0]["function"]["arguments"] for one in found] == ARGUMENTS
    assert [one.tools for one in found] == [TOOLS] * len(ARGUMENTS)
