"""Rows in the layouts that people use become the same conversations."""

import json

import pytest

from lora_sft.data.formats import Reading, to_conversation, to_conversations
from lora_sft.data.sources import Row
from lora_sft.errors import DataError, SettingError

SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}


def read(value):
    return to_conversation(Row(value, "a.jsonl:1"))


def test_openai_messages_stay_as_they_are():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert read({"messages": messages, "tools": [SCHEMA]}).messages == messages
    assert read({"messages": messages, "tools": [SCHEMA]}).tools == [SCHEMA]


def test_sharegpt_speakers_become_roles():
    turns = [
        ("system", "s"),
        ("human", "hi"),
        ("gpt", "yo"),
        ("function_call", json.dumps({"name": "add", "arguments": {"a": 1, "b": [2]}})),
        ("observation", "3"),
        ("gpt", "three"),
    ]
    found = read(
        {
            "conversations": [{"from": who, "value": what} for who, what in turns],
            "tools": json.dumps([SCHEMA["function"]]),
        }
    )
    assert [message["role"] for message in found.messages] == [
        "system",
        "user",
        "assistant",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found.messages[3] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.tools == [SCHEMA]


def test_typed_parts_become_content_reasoning_and_calls():
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "text": "yo"},
        {"type": "tool_call", "value": json.dumps(CALL["function"])},
    ]
    found = read(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "hi"}]},
                {"role": "assistant", "content": parts},
            ]
        }
    )
    assert found.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo", "reasoning_content": "hm", "tool_calls": [CALL]},
    ]


def test_arguments_written_as_text_become_an_object():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
    found = read({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert found.messages[0] == {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]}


def test_the_old_function_call_becomes_a_tool_call():
    found = read(
        {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}]}
    )
    assert found.messages[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {}}


def test_a_system_column_comes_first():
    found = read({"system": "S", "messages": [{"role": "assistant", "content": "yo"}]})
    assert found.messages[0] == {"role": "system", "content": "S"}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}])
def test_a_reply_can_be_marked_as_not_learned(mark):
    replies = [{"role": "assistant", "content": "a", **mark}, {"role": "assistant", "content": "b", "weight": 1}]
    assert [message.get("train", True) for message in read({"messages": replies}).messages] == [False, True]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"messages": [{"role": "assistant"}]}, r"messages\[0\]: the assistant says nothing"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "weight or train is 0.5"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "every reply is marked as not learned"),
        ("text", "is str, not an object"),
        ({"words": "x"}, "has no known layout: it has words; use messages"),
        ({"messages": []}, "messages: is not a list with something in it"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            r'messages\[0\].role: "bot" is not a role; use system, developer, user',
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": 3}]}, r"messages\[0\].content: is int"),
        ({"messages": [{"content": "x"}]}, 'is not an object with "role"'),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, r"content\[0\]: is not a text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": 3}]}]}, "is not a call"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, '"alien" is not a speaker'),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "no valid JSON at column 2"),
        ({"messages": [{"role": "assistant", "content": "x"}], "tools": "nonsense"}, "tools: no valid JSON"),
    ],
)
def test_a_row_that_is_no_conversation_is_told_with_its_place(value, words):
    with pytest.raises(DataError, match=r"a\.jsonl:1.*" + words):
        read(value)


QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ({"instruction": "q", "output": "a"}, [QUESTION, ANSWER]),
        ({"instruction": "q", "input": "", "output": "a"}, [QUESTION, ANSWER]),
        ({"instruction": "q", "input": "i", "output": "a"}, [{"role": "user", "content": "q\n\ni"}, ANSWER]),
        (
            {"instruction": "q", "output": "a", "history": [["q", "a"]], "system": "s"},
            [{"role": "system", "content": "s"}, QUESTION, ANSWER, QUESTION, ANSWER],
        ),
        ({"prompt": "q", "completion": "a"}, [QUESTION, ANSWER]),
        (
            {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]},
            [QUESTION, ANSWER | {"train": False}, QUESTION, ANSWER],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1}]},
            [QUESTION, ANSWER],
        ),
        (
            {"messages": [QUESTION, ANSWER, {"role": "function", "name": "f", "content": "1"}]},
            [QUESTION, ANSWER, {"role": "tool", "name": "f", "content": "1"}],
        ),
    ],
)
def test_other_layouts_become_the_same_messages(value, messages):
    assert read(value).messages == messages


def test_text_and_tokens_stay_what_they_are():
    assert read({"text": "once upon"}).text == "once upon"
    found = read({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]})
    assert (found.input_ids, found.labels, found.messages) == ([1, 2, 3], [-100, 2, 3], [])
    assert read({"input_ids": [1, 2]}).labels == [1, 2]


def test_columns_and_roles_can_be_named():
    reading = Reading(columns={"prompt": "question", "completion": "answer"})
    assert to_conversation(Row({"question": "q", "answer": "a"}, "a:1"), reading).messages == [QUESTION, ANSWER]
    reading = Reading(roles={"bot": "assistant", "me": "user"})
    rows = [
        {"messages": [QUESTION | {"role": "me"}, ANSWER | {"role": "bot"}]},
        {"conversations": [{"from": "me", "value": "q"}, {"from": "bot", "value": "a"}]},
    ]
    assert [to_conversation(Row(row, "a:1"), reading).messages for row in rows] == [[QUESTION, ANSWER]] * 2


def test_a_named_layout_is_kept_to():
    row = {"text": "t", "prompt": "q", "completion": "a"}
    assert to_conversation(Row(row, "a:1"), Reading(layout="text")).text == "t"
    with pytest.raises(DataError, match="a:1: lacks messages of the layout messages; it has text, prompt, completion"):
        to_conversation(Row(row, "a:1"), Reading(layout="messages"))


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        ({"layout": "alpaka"}, "layout 'alpaka' is not one of alpaca, messages"),
        ({"columns": {"qestion": "x"}}, "qestion is not one of our columns; use messages"),
        ({"roles": {"bot": "robot"}}, "robot is not a role; use system"),
    ],
)
def test_a_wish_that_cannot_be_is_told(reading, words):
    with pytest.raises(SettingError, match=words):
        Reading(**reading)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "labels: has 1 numbers for 2 input_ids"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, r"labels\[1\]: is 3 at the token 2"),
        ({"input_ids": [1, "2"]}, "input_ids: is not a list of whole numbers"),
        ({"input_ids": [1, -5]}, "holds a number that is no token id"),
        ({"text": " "}, "text: is empty"),
        ({"instruction": 3, "output": "a"}, "instruction: is int; give text"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, r"history\[0\]: is not a pair"),
        ({"messages": [ANSWER | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "arguments: is list"),
        ({"messages": [ANSWER | {"content": {"a": 1}}]}, "content: is dict; give text or a list of parts"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "is not a role"),
    ],
)
def test_other_rows_that_are_none_are_told_with_their_place(value, words):
    with pytest.raises(DataError, match=r"a\.jsonl:1.*" + words):
        read(value)


def test_all_bad_rows_are_told_at_once_and_an_empty_dataset_too():
    with pytest.raises(DataError, match="11 problems"):
        to_conversations([Row("x", f"a:{n}") for n in range(12)])
    with pytest.raises(DataError, match="the dataset is empty"):
        to_conversations([])
