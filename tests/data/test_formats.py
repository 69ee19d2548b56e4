"""Rows in the layouts that people use become the same conversations."""

import json

import pytest

from lora_sft.data.formats import to_conversation, to_conversations
from lora_sft.data.sources import Row
from lora_sft.errors import DataError

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
        ({"text": "x"}, 'has the keys text, but a conversation stands under "messages"'),
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


def test_all_bad_rows_are_told_at_once_and_an_empty_dataset_too():
    with pytest.raises(DataError, match="11 problems"):
        to_conversations([Row("x", f"a:{n}") for n in range(12)])
    with pytest.raises(DataError, match="the dataset is empty"):
        to_conversations([])
