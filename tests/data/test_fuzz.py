"""Ten thousand broken rows: each is taken whole or told with its place; nothing crashes, nothing is lost in silence."""

import json
import random
from copy import deepcopy
from typing import Any

import pytest

from lora_sft.chat.missing import words_of
from lora_sft.data.intake import Intake
from lora_sft.data.sources import Row, read_rows
from lora_sft.errors import LoraSftError
from lora_sft.model.tokenizer import Speech
from lora_sft.preparation.prepare import render_conversation

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [None, "x"]}}}
SEEDS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "said-0"}, {"role": "assistant", "content": "said-1"}]},
    {
        "messages": [
            {"role": "system", "content": "said-0"},
            {"role": "user", "content": [{"type": "text", "text": "said-1"}]},
            {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "said-2"},
            {"role": "tool", "content": "said-3"},
            {"role": "assistant", "content": "said-4", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    },
    {"conversations": [{"from": "human", "value": "said-0"}, {"from": "gpt", "value": "said-1"}], "tools": "[]"},
    {"instruction": "said-0", "input": "said-1", "output": "said-2", "history": [["said-3", "said-4"]]},
    {"prompt": "said-0", "completion": "said-1"},
    {"text": "said-0"},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
]
ODD: list[Any] = [
    *(None, True, 0, -1, 2**70, 1.5, float("nan"), -100),
    *("", " ", "\0", "\ud800", "<|im_end|>", "é" * 50, "x" * 5000, "[", '{"a": 1}', "assistant"),
    *([], {}, [[]], {"role": "user"}, {"a": {"b": {"c": []}}}, [None], ["a", 1], [1, 2], [[1], 2]),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a value."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += [(value, key), *places(item)]
    return found


def mutated(dice: random.Random) -> Any:
    row = json.loads(json.dumps(dice.choice(SEEDS)))
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3))):
        spots = places(row)
        if not spots:
            break
        container, key = dice.choice(spots)
        what = dice.randrange(5)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[dice.choice(["role", "from", "Messages", "text", "x"])] = container.pop(key)
        elif what == 2 and isinstance(container, list):
            container.insert(key, deepcopy(dice.choice([*ODD, container[key]])))
        else:
            container[key] = deepcopy(dice.choice(ODD))
    return row


def rendered_or_why_not(conversation, speech):
    try:
        return render_conversation(conversation, speech, {})[0]
    except LoraSftError as error:
        return str(error)


def test_ten_thousand_mutated_rows(tokenizer):
    """A row that is taken has every character of its replies in the text; any other is told with its place."""
    dice, intake = random.Random(0), Intake()
    rows = [Row(mutated(dice), f"fuzz:{number}") for number in range(10_000)]
    taken = list(intake.conversations(rows))
    told = {problem.source for problem in intake.problems if problem.is_grave}
    assert {one.source for one in taken} | told == {row.source for row in rows}
    assert not {one.source for one in taken} & told
    assert 1000 < len(taken) < 9000
    speech = Speech(tokenizer, ["<|im_end|>"])
    rendered = refused = 0
    for one in taken:
        if one.input_ids is not None:
            continue
        text = rendered_or_why_not(one, speech)
        if isinstance(text, str):
            assert one.source in text
            refused += 1
            continue
        rendered += 1
        for message in one.messages:
            if message["role"] == "assistant" and message.get("train") is not False:
                learned = "".join(text.text[start:end] for start, end in text.supervised)
                assert words_of(message["content"]) in learned, one.source
    assert rendered > 900
    assert refused < rendered / 20


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"])
def test_broken_files_never_crash(tmp_path, name):
    """Bytes are changed, cut off, put in; each row that comes out has its place, each error is one of ours."""
    dice = random.Random(name)
    lines = [json.dumps(row) for row in SEEDS]
    whole = ("[" + ",\n".join(lines) + "]" if name == "a.json" else "\n".join(lines)).encode()
    if name == "a.csv":
        whole = b'prompt,completion\n"q\nq",a\nq,"a, b"\n' * 20
    elif name.startswith(("a.parquet", "a.arrow", "a.jsonl.")):
        whole = _table(tmp_path, name, whole)
    (tmp_path / name).write_bytes(whole)
    assert len(list(read_rows(tmp_path / name))) >= 4
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(dice.randrange(1, 6)):
            place = dice.randrange(len(broken))
            what = dice.randrange(3)
            if what == 0:
                broken[place] = dice.randrange(256)
            elif what == 1:
                del broken[place : place + dice.randrange(1, 40)]
            else:
                broken[place:place] = dice.randbytes(dice.randrange(1, 9))
            if not broken:
                break
        (tmp_path / name).write_bytes(broken)
        intake, refused = Intake(), ""
        try:
            taken = list(intake.conversations(read_rows(tmp_path / name)))
        except LoraSftError as error:
            taken, refused = [], str(error)
        assert all(one.source.startswith(name) for one in taken)
        assert not refused or name in refused
        assert refused or intake.usable <= intake.rows <= intake.usable + intake.grave


def _table(folder, name: str, lines: bytes) -> bytes:
    import gzip

    import pyarrow as pa
    from pyarrow import parquet

    if name.endswith(".gz"):
        return gzip.compress(lines)
    if name.endswith(".zst"):
        return pa.compress(lines, codec="zstd", asbytes=True)
    table = pa.Table.from_pylist([{"prompt": f"q{n}", "completion": "a"} for n in range(50)])
    if name.endswith(".parquet"):
        parquet.write_table(table, folder / "whole")
    else:
        with pa.OSFile(str(folder / "whole"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return (folder / "whole").read_bytes()
