"""Every row is accounted for: a conversation, or a problem with its place, what is wrong and what to do."""

import json

import pytest

from lora_sft.data.checks import check_conversation
from lora_sft.data.conversation import Conversation
from lora_sft.data.intake import Intake
from lora_sft.data.sources import Row, read_rows
from lora_sft.errors import DataError

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = REPLY | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "1"}


def problems(*messages, **more) -> list[str]:
    return [str(problem) for problem in check_conversation(Conversation(list(messages), source="a:1", **more))]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([USER, REPLY], []),
        ([USER, CALL, RESULT, REPLY], []),
        ([{"role": "system", "content": "s"}, USER, REPLY], []),
        ([USER, REPLY | {"content": "  "}], ["a:1: messages[1]: is an empty reply"]),
        ([USER, REPLY | {"content": "", "train": False}, USER, REPLY], ["a:1: messages[1]: is an empty reply"]),
        ([USER, REPLY, RESULT], ["a:1: messages[2]: is the result of a call that nobody made"]),
        ([USER, CALL, RESULT, RESULT, REPLY], ["a:1: messages[3]: is the result of a call that nobody made"]),
        ([{"role": "system", "content": "s"}] * 2 + [USER, REPLY], ["a:1: messages[1]: is a second system prompt"]),
        (
            [USER, {"role": "system", "content": "s"}, REPLY],
            ["a:1: messages[1]: is a system prompt behind other turns"],
        ),
        ([USER | {"content": "x\0"}, REPLY], ["a:1: messages[0].content: holds a NUL character; take it out"]),
        ([USER, REPLY | {"content": "é\ud800"}], ["a:1: messages[1].content: holds half a character at 2"]),
    ],
)
def test_what_is_odd_about_a_conversation_is_told(messages, words):
    found = problems(*messages)
    assert [line.startswith(word) for line, word in zip(found, words, strict=True)] == [True] * len(words)


def test_odd_characters_are_found_in_tools_and_arguments_too():
    call = REPLY | {"tool_calls": [{"function": {"name": "f", "arguments": {"a": ["\0"]}}}]}
    assert problems(USER, call)[0].startswith("a:1: messages[1].tool_calls[0].function.arguments.a[0]: holds a NUL")
    assert problems(USER, REPLY, tools=[{"x\ud800": 1}])[0].startswith("a:1: tools[0]: holds half a character")


def test_the_account_adds_up(tmp_path):
    rows = [
        {"messages": [USER, REPLY]},
        {"messages": [USER, REPLY]},
        {"messages": [USER, {"role": "bot", "content": "x"}]},
        {"messages": [USER, REPLY | {"content": ""}]},
        {"instruction": "q", "output": "another"},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{", ""]))
    intake = Intake(names_repetitions=True)
    found = list(intake.conversations(read_rows(tmp_path / "a.jsonl")))
    intake.count_repetitions()
    assert "a.jsonl:2: says the same as a.jsonl:1; is it meant to weigh twice?" in map(str, intake.problems)
    assert [one.source for one in found] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:5"]
    assert (intake.rows, intake.usable, intake.grave, intake.duplicates) == (6, 3, 3, 1)
    assert intake.layouts == {"messages": 2, "alpaca": 1}
    told = [json.loads(line) for line in intake.bad_rows().splitlines()]
    assert [(line["source"], line["field"]) for line in told] == [
        ("a.jsonl:3", "messages[1].role"),
        ("a.jsonl:4", "messages[1]"),
        ("a.jsonl:6", ""),
    ]
    assert told[0]["row"] == rows[2]


def test_bad_rows_are_refused_together_with_what_to_do():
    intake = Intake()
    list(intake.conversations(Row("x", f"a:{n}") for n in range(12)))
    with pytest.raises(DataError) as refused:
        intake.refuse()
    words = str(refused.value)
    assert words.startswith("12 of 12 rows cannot be trained on:")
    assert words.count("is str, not an object") == 10
    assert "… and 2 more" in words
    assert "on_bad_row: skip" in words


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="the dataset is empty"):
        Intake().refuse()


def test_columns_of_which_nothing_is_made_are_counted():
    intake = Intake()
    given = [
        {"messages": [USER, REPLY], "id": 1, "tools": None},
        {"instruction": "q", "output": "a", "text": "t", "id": 2},
    ]
    list(intake.conversations(Row(value, "a:1") for value in given))
    assert intake.unused == {"id": 2, "text": 1}


def test_a_bad_row_is_kept_as_it_stands_and_as_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"broken": \n{"messages": [], "x": NaN}\n')
    intake = Intake()
    list(intake.conversations(read_rows(tmp_path / "a.jsonl")))
    told = [json.loads(line, parse_constant=pytest.fail) for line in intake.bad_rows().splitlines()]
    assert [line["row"] for line in told] == ['{"broken":', {"messages": [], "x": "NaN"}]
