"""What a person gets wrong is one clear error with exit code 2, before weights are read, and nothing is left behind."""

import json
import shutil

import pytest
import torch

from tests.cli.test_commands import run
from tests.conftest import HARBOUR

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}


def rows(path, *messages):
    path.write_text("".join(json.dumps({"messages": list(one)}) + "\n" for one in messages))
    return path


@pytest.fixture
def cases(base, tmp_path):
    """{what is wrong: (words that replace the good ones, what the error says)}"""
    plain = shutil.copytree(base, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    (tmp_path / "in-use").mkdir()
    (tmp_path / "in-use" / "thesis.txt").write_text("mine")
    return {
        "missing model": (["--model", "/no/such/model"], "model /no/such/model: no such folder"),
        "no model": (["--model", "null"], "no base model: give one with model_name_or_path"),
        "no chat template": (["--model", plain], "the model has no chat template; choose one with chat_template"),
        "unknown template": (
            ["--chat-template", "chatlm"],
            'chat_template "chatlm" is not one of alpaca, chatml, command-r, deepseek-r1, ',
        ),
        "no assistant turn": (["--dataset", rows(tmp_path / "a.jsonl", [USER])], "a.jsonl:1: no assistant turn"),
        "unknown role": (
            ["--dataset", rows(tmp_path / "b.jsonl", [USER, ASSISTANT], [{"role": "bot", "content": "x"}])],
            'b.jsonl:2: messages[0].role: "bot" is not a role; use system, developer, user, assistant, tool',
        ),
        "empty dataset": (["--dataset", rows(tmp_path / "c.jsonl")], "the dataset is empty"),
        "missing dataset": (["--dataset", "missing.jsonl"], "missing.jsonl: no such file or folder"),
        "a target that matches nothing": (
            ["--lora-target-modules", "q_porj"],
            "q_porj matches nothing in this model; did you mean q_proj",
        ),
        "one target of two": (
            ["--lora-target-modules", "q_proj,v_porj"],
            "v_porj matches nothing in this model; did you mean v_proj",
        ),
        "a regex that hits a norm": (["--lora-target-modules", ".*_layernorm"], "the adapter cannot be attached"),
        "CUDA that is not there": (["--device", "cuda"], "device: cuda is asked for, but"),
        "float16 on the CPU": (["--fp16", "--device", "cpu"], "training in float16 needs a GPU"),
        "output folder in use": (["--output-dir", tmp_path / "in-use"], "is in use (it holds thesis.txt)"),
        "a checkpoint that is not there": (["--resume-from-checkpoint", "true"], "holds no checkpoint"),
        "unknown setting": (["--lerning-rate", "1"], 'unknown setting "lerning_rate"; did you mean learning_rate'),
        "wrong value": (["--max-length", "-5"], "max_length: -5: input should be greater than or equal to 2"),
        "nothing fits": (["--max-length", "3"], "nothing is left to learn: 28 too long for max_length 3"),
        "unknown optimizer": (["--optim", "best"], "the training settings do not go together"),
        "not a setting": (["learn fast"], '"learn fast" is no setting; write --name value or name=value'),
        "a value is missing": (["--seed"], "--seed needs a value"),
    }


NAMES = [
    "missing model",
    "no model",
    "no chat template",
    "unknown template",
    "no assistant turn",
    "unknown role",
    "empty dataset",
    "missing dataset",
    "a target that matches nothing",
    "one target of two",
    "a regex that hits a norm",
    "CUDA that is not there",
    "float16 on the CPU",
    "output folder in use",
    "a checkpoint that is not there",
    "unknown setting",
    "wrong value",
    "nothing fits",
    "unknown optimizer",
    "not a setting",
    "a value is missing",
]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_one_clear_error_before_weights_are_read(name, cases, base, tmp_path, capsys, monkeypatch):
    if name == "CUDA that is not there" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")

    def read_weights(*_):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("lora_sft.training.run.load_base", read_weights)
    words, expected = cases[name]
    good = ["--model", base, "--dataset", HARBOUR, "--output-dir", tmp_path / "out"]
    code, out, err = run(capsys, "train", *good, *words)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_the_list_of_names_is_whole(cases):
    assert sorted(cases) == sorted(NAMES)
