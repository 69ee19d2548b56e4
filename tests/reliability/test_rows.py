"""Rows that are no conversations, or lose what they say: told with file, line and field, counted, never silent."""

import json
import re

import pytest

from lora_sft.data.intake import Intake
from lora_sft.data.sources import read_rows
from lora_sft.errors import DataError, LoraSftError
from lora_sft.model.tokenizer import prepare_speech
from lora_sft.preparation.dataset import read_data
from lora_sft.settings import resolve
from tests.conftest import conversation

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def talk(*messages, **more):
    return {"messages": list(messages), **more}


def called(arguments, name="f"):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def raw(text):
    """A line that is no JSON, or that Python would not write."""
    return text


BAD = [
    # (the row, the field, what is wrong with it)
    (raw('{"messages": ['), "", "no valid JSON at column 15"),
    (raw('{"messages": 1 "x": 2}'), "", "no valid JSON at column 16"),
    (raw('{"messages": [], "messages": []}'), "", '"messages" stands twice in an object'),
    (
        raw('{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}'),
        "",
        '"content" stands twice in an object',
    ),
    (raw('"just text"'), "", "is str, not an object"),
    (raw("[]"), "", "is list, not an object"),
    (raw("null"), "", "is nothing, not an object"),
    ({}, "", "has no known layout: it has no columns"),
    ({"question": "q", "answer": "a"}, "", "has no known layout: it has question, answer"),
    (talk(), "messages", "is not a list with something in it"),
    ({"messages": {"role": "user"}}, "messages", "is not a list with something in it"),
    ({"messages": "hello"}, "messages", "no valid JSON at column 1"),
    (talk("hello"), "messages[0]", 'is not an object with "role" and "content"'),
    (talk({"content": "q"}, REPLY), "messages[0]", 'is not an object with "role" and "content"'),
    (talk(USER, {"role": "bot", "content": "a"}), "messages[1].role", '"bot" is not a role'),
    (talk(USER, {"role": None, "content": "a"}), "messages[1].role", '"None" is not a role'),
    (talk({"role": "user", "contents": "q"}, REPLY), "messages[0]", "has no content, only role, contents"),
    (talk(USER, {"role": "assistant", "contents": "a"}), "messages[1]", "the assistant says nothing"),
    (talk({"role": "user", "content": 7}, REPLY), "messages[0].content", "is int"),
    (talk(USER, {"role": "assistant", "content": 1e5}), "messages[1].content", "is float"),
    (talk(USER, {"role": "assistant", "content": True}), "messages[1].content", "is bool"),
    (
        talk({"role": "user", "content": [{"type": "image", "url": "x"}]}, REPLY),
        "messages[0].content[0]",
        "is not a text, reasoning or tool_call part",
    ),
    (talk(USER), "", "no assistant turn"),
    (talk(USER, REPLY | {"train": False}), "", "every reply is marked as not learned"),
    (talk(USER, REPLY | {"weight": 0.5}), "messages[1]", "weight or train is 0.5"),
    (talk(USER, {"role": "assistant", "content": " \n"}), "messages[1]", "is an empty reply"),
    (talk(USER, REPLY, {"role": "tool", "content": "1"}), "messages[2]", "is the result of a call that nobody made"),
    (talk(USER, called("{broken")), "messages[1].tool_calls[0].arguments", "no valid JSON at column 2"),
    (talk(USER, called([1])), "messages[1].tool_calls[0].arguments", "is list"),
    (
        raw(json.dumps(talk(USER, called({"a": float("nan")})))),
        "messages[1].tool_calls[0].function.arguments.a",
        "is nan, which JSON does not have",
    ),
    (talk(USER, called({}, name=3)), "messages[1].tool_calls[0]", 'is not a call with "name" and "arguments"'),
    (talk(USER, REPLY, tools={"name": "f"}), "tools", "is not a list of function schemas"),
    (talk(USER | {"content": "a\0b"}, REPLY), "messages[0].content", "holds a NUL character"),
    (talk(USER, REPLY | {"content": "\ud800"}), "messages[1].content", "holds half a character at 1"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "conversations[0].from", '"narrator" is not a speaker'),
    ({"conversations": [{"from": "human"}]}, "conversations[0]", 'is not an object with "from" and "value"'),
    ({"instruction": "q", "output": 5}, "output", "is int"),
    ({"instruction": "q", "output": "a", "history": [["x"]]}, "history[0]", "is not a pair of question and answer"),
    ({"prompt": "q", "completion": ["a"]}, "completion[0]", 'is not an object with "role" and "content"'),
    ({"text": " "}, "text", "is empty"),
    ({"input_ids": [1, 2], "labels": [1]}, "labels", "has 1 numbers for 2 input_ids"),
    ({"input_ids": [1, 2], "labels": [1, 3]}, "labels[1]", "is 3 at the token 2"),
    ({"input_ids": [1, 2.5]}, "input_ids", "is not a list of whole numbers"),
    ({"input_ids": [2**31]}, "input_ids", "holds a number that is no token id"),
]


def test_each_listed_row_is_told_with_file_line_and_field(tmp_path):
    """Good rows stand between the bad ones: none of them is lost."""
    lines = []
    for row, _, _ in BAD:
        lines += [row if isinstance(row, str) else json.dumps(row), json.dumps(talk(USER, REPLY))]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    intake = Intake()
    taken = list(intake.conversations(read_rows(tmp_path / "rows.jsonl")))
    told = [str(problem) for problem in intake.problems]
    assert len(told) == len(BAD) >= 30
    for number, ((_, field, words), found) in enumerate(zip(BAD, told, strict=True)):
        where = f"rows.jsonl:{2 * number + 1}: " + (f"{field}: " if field else "")
        assert found.startswith(where + words), found
        assert ";" in found, f"says what to do: {found}"
    assert [one.source for one in taken] == [f"rows.jsonl:{2 * number + 2}" for number in range(len(BAD))]
    assert (intake.rows, intake.grave) == (2 * len(BAD), len(BAD))


# --- rows that are lost, and how many may be ------------------------------------------------------------------


@pytest.fixture
def speech(tokenizer):
    return prepare_speech(tokenizer)


def good(count):
    return [{"messages": conversation(f"what is {n}?", f"it is {n * 7919}")} for n in range(count)]


LONG = "again and again " * 40
LOST = {
    "too long": (
        lambda n: {"messages": conversation("hi", f"{n} {LONG}")},
        {"max_length": 60},
        r"4 rows \(row 4, row 5, row 6, …\) longer than max_length; raise max_length, mend the rows",
        lambda data: len(data.train.too_long),
    ),
    "truncated": (
        lambda n: {"messages": conversation("hi", f"{n} {LONG}")},
        {"max_length": 60, "truncation": "cut"},
        r"4 shortened to max_length; raise max_length",
        lambda data: data.train.cut,
    ),
    "masked whole": (
        lambda n: {"messages": conversation(f"{n} {LONG}", "yo")},
        {"max_length": 60, "truncation": "cut"},
        r"4 rows \(row 4, row 5, row 6, …\) without a token to learn",
        lambda data: len(data.train.without_reply),
    ),
    "masked by their labels": (
        lambda n: {"input_ids": [5, 6, 7, n], "labels": [-100] * 4},
        {"allow": ["no_reply"]},
        r"4 rows \(row 4, row 5, row 6, …\) without a token to learn",
        lambda data: len(data.train.without_reply),
    ),
    "empty": (
        lambda n: {"messages": conversation(f"what is {n}?", "")},
        {"on_bad_row": "skip"},
        r"4 cannot be trained on",
        lambda data: data.intake.grave,
    ),
    "duplicated": (
        lambda n: {"messages": conversation("what is 1?", "it is 7919")},
        {},
        r"4 of 7 rows say the same as one before, more than max_lost_share 0.5",
        lambda data: data.intake.duplicates,
    ),
}


@pytest.mark.parametrize("kind", LOST)
def test_lost_rows_are_counted_and_refused_past_a_threshold(kind, speech, capsys):
    make, settings, words, counted = LOST[kind]

    def read(many, share=0.5):
        rows = good(3) + [make(n) for n in range(many)]
        return read_data(resolve({"data_cache": "off", "max_lost_share": share, **settings}), speech, rows)

    assert counted(read(3)) == 3  # 3 of 6 is not more than a half
    assert re.search(r"3 rows|3 of 6 rows", capsys.readouterr().err)
    with pytest.raises(DataError, match=words) as refused:
        read(4)
    assert "raise max_lost_share" in str(refused.value)
    assert "4 of 7 rows" in str(refused.value)
    assert counted(read(4, share=1)) == 4
    with pytest.raises(DataError):
        read(1, share=0)
    assert counted(read(0, share=0)) == 0


def test_losses_of_several_kinds_add_up(speech):
    rows = [*good(3), *[LOST["too long"][0](n) for n in range(2)], {"messages": []}, {"messages": []}]
    with pytest.raises(
        DataError, match=r"4 of 7 rows would be lost.*2 cannot be trained on.*; 2 rows \(row 4, row 5\)"
    ):
        read_data(resolve({"data_cache": "off", "max_length": 60, "on_bad_row": "skip"}), speech, rows)


def test_the_threshold_holds_for_what_was_prepared_before_too(speech, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, good(3) + [LOST["too long"][0](n) for n in range(4)])))
    settings = {"dataset": str(tmp_path / "a.jsonl"), "max_length": 60, "data_cache": str(tmp_path / "cache")}
    assert len(read_data(resolve({**settings, "max_lost_share": 1}), speech).train.examples) == 3
    with pytest.raises(DataError, match="would be lost"):
        read_data(resolve(settings), speech)


@pytest.mark.parametrize("name", ["examples.arrow", "prepared.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted", "a bit flipped"])
def test_a_damaged_cache_is_prepared_anew(name, damage, speech, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, good(20))))
    config = resolve({"dataset": str(tmp_path / "a.jsonl"), "data_cache": str(tmp_path / "cache")})
    fresh = list(read_data(config, speech).train.examples)
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    whole = file.read_bytes()
    half = len(whole) // 2
    if damage == "deleted":
        file.unlink()
    else:
        flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
        file.write_bytes({"truncated": whole[:half], "emptied": b"", "a bit flipped": flipped}[damage])
    capsys.readouterr()
    assert list(read_data(config, speech).train.examples) == fresh
    assert "is damaged: prepared anew" in capsys.readouterr().err.replace("\n", " ")
    assert file.read_bytes() == whole


def test_a_source_without_rows_beside_others_is_told(speech, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, good(3))))
    (tmp_path / "b.jsonl").write_text("\n")
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    with pytest.raises(LoraSftError, match=r"b.jsonl: holds no rows, unlike the other sources"):
        read_data(resolve({"data_cache": "off", "dataset": paths}), speech)
