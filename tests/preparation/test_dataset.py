"""From what was given as data to the examples of a run: sources, mixing, the part kept out, the cache."""

import json

import datasets
import pytest

from lora_sft.config import RunConfig
from lora_sft.errors import DataError, SettingError
from lora_sft.model.tokenizer import prepare_speech
from lora_sft.preparation import dataset as reading
from lora_sft.preparation.dataset import read_data
from lora_sft.settings import resolve
from tests.conftest import conversation


@pytest.fixture
def speech(tokenizer):
    return prepare_speech(tokenizer)


def rows(name: str, count: int) -> list[dict]:
    return [
        {"messages": conversation(f"{name} asks {n * 7919} of {n}", f"{name} answers {n * 104729}")}
        for n in range(count)
    ]


def settings(**given) -> RunConfig:
    return resolve({"data_cache": "off", **given})


def sources(prepared) -> list[str]:
    return [example.source for example in prepared.examples]


def test_a_list_of_sources_is_one_after_the_other(speech, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(name, 2))))
    config = settings(dataset=[str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.jsonl")}])
    assert sources(read_data(config, speech).train) == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]


def test_sources_are_mixed_by_their_weights(speech, capsys):
    given = [(rows("a", 60), 3), (datasets.Dataset.from_list(rows("b", 60)), 1)]
    found = read_data(settings(), speech, given).train
    texts = [speech.tokenizer.decode(example.input_ids) for example in found.examples]
    assert [sum(f"{name} asks" in text for text in texts) for name in "ab"] == [60, 20]
    assert "of 60 examples, 75.0% of the mix" in capsys.readouterr().err


def test_a_count_or_a_fraction_takes_a_part_of_a_source(speech, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows("a", 10))))
    path = str(tmp_path / "a.jsonl")
    found = read_data(settings(dataset=[{"path": path, "count": 3}, {"path": path, "fraction": 0.5}]), speech).train
    assert len(found.examples) == 8


def test_each_source_may_have_a_layout_of_its_own(speech, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "hi", "a": "yo"}\n')
    (tmp_path / "b.csv").write_text("instruction,output\nhi,yo\n")
    columns = {"prompt": "q", "completion": "a"}
    config = settings(dataset=[{"path": str(tmp_path / "a.jsonl"), "columns": columns}, str(tmp_path / "b.csv")])
    first, second = read_data(config, speech).train.examples
    assert first.input_ids == second.input_ids


def test_near_duplicates_stay_on_one_side(speech):
    words = (
        "the quick brown fox jumps over the lazy dog while seven old boats wait for the evening tide in the harbour "
    )
    words += "and the keeper of the lighthouse counts the gulls that come home from the far side of the quiet bay"
    given = rows("a", 30)
    for n in range(10):
        given.append({"messages": conversation(f"{words} {n}", "a reply that they all share with one another")})
    data = read_data(settings(eval_size=0.25), speech, given)
    train, held_out = (
        [speech.tokenizer.decode(example.input_ids) for example in part.examples]
        for part in (data.train, data.evaluation)
    )
    assert len(train) + len(held_out) == 40
    assert 8 <= len(held_out) <= 12
    assert not (any("brown fox" in text for text in train) and any("brown fox" in text for text in held_out))


def test_bad_rows_are_refused_or_left_out_and_kept(speech):
    given = [*rows("a", 2), {"messages": conversation("no answer")}]
    with pytest.raises(DataError, match="row 3: no assistant turn"):
        read_data(settings(), speech, given)
    data = read_data(settings(on_bad_row="skip"), speech, given)
    assert (len(data.train.examples), data.intake.grave) == (2, 1)
    assert json.loads(data.intake.bad_rows())["row"] == given[2]
    with pytest.raises(DataError, match="no assistant turn"):
        read_data(settings(on_bad_row="skip"), speech, given[2:])


def test_text_and_tokens_are_learned_as_they_are(speech):
    text, tokens = read_data(
        settings(), speech, [{"text": "once"}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    ).train.examples
    assert speech.tokenizer.decode(text.labels) == "once<|im_end|>"
    assert (tokens.input_ids, tokens.labels) == ([5, 6, 7], [-100, 6, 7])


def test_prepared_data_is_read_from_the_cache_until_something_changes(speech, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows("a", 5))))
    config = settings(dataset=str(tmp_path / "a.jsonl"), data_cache=str(tmp_path / "cache"))
    fresh = read_data(config, speech)
    prepares = []
    honest = reading.prepare
    monkeypatch.setattr(reading, "prepare", lambda *given, **more: prepares.append(1) or honest(*given, **more))
    again = read_data(config, speech)
    assert (again.train, again.intake, prepares) == (fresh.train, fresh.intake, [])
    read_data(config.model_copy(update={"max_length": 99}), speech)
    assert len(prepares) == 1
    speech.tokenizer.chat_template += "{# changed #}"
    read_data(config, speech)
    assert len(prepares) == 2
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows("b", 5))))
    assert "b asks" in speech.tokenizer.decode(read_data(config, speech).train.examples[0].input_ids)
    assert len(prepares) == 3


def test_a_preparation_that_fails_leaves_nothing_in_the_cache(speech, tmp_path):
    config = settings(data_cache=str(tmp_path / "cache"))
    with pytest.raises(DataError):
        read_data(config, speech, [{"messages": conversation("no answer")}])
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_stream_is_read_once(speech):
    stream = datasets.Dataset.from_list(rows("a", 5)).to_iterable_dataset()
    assert len(read_data(settings(data_cache="auto"), speech, stream).train.examples) == 5


def test_the_conversation_that_is_shown_is_the_one_that_is_named(speech, tmp_path):
    for name, count in (("a", 9), ("b", 9)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(name, count))))
    given = [{"path": str(tmp_path / "a.jsonl"), "weight": 1}, {"path": str(tmp_path / "b.jsonl"), "weight": 2}]
    first = read_data(settings(dataset=given), speech).train.first
    assert first.source == "a.jsonl:1"
    assert "a asks 0 of 0" in first.rendered.text
    assert first.tokens == len(speech.tokenizer(first.rendered.text)["input_ids"])


def test_a_wrong_wish_for_a_source_is_told(speech):
    with pytest.raises(SettingError, match=r"dataset: wieght: extra inputs are not permitted \(known: path, split"):
        read_data(settings(), speech, [{"path": "a.jsonl", "wieght": 3}])
