"""Every command does what its help says; results go to standard output, words to standard error."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lora_sft.chat import check as checking
from lora_sft.cli import doctor, main
from lora_sft.exporting.targets import TARGETS, find_target
from tests.conftest import HARBOUR

QUICK = [
    "--max-steps",
    "3",
    "--save-strategy",
    "no",
    "--per-device-train-batch-size",
    "4",
    "--gradient-accumulation-steps",
    "1",
    "--learning-rate",
    "5e-3",
    "--warmup-ratio",
    "0",
    "--lora-r",
    "8",
]


def run(capsys, *words) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "adapter"
    with pytest.raises(SystemExit) as ended:
        main(["train", "--model", str(base), "--dataset", str(HARBOUR), "--output-dir", str(folder), *QUICK])
    assert not ended.value.code
    return folder


def test_train_prints_json_on_standard_output_and_words_on_standard_error(base, tmp_path, capsys):
    code, out, err = run(
        capsys, "train", "--model", base, "--dataset", HARBOUR, "--output-dir", tmp_path / "a", "--json", *QUICK
    )
    result = json.loads(out)
    assert code == 0
    assert {"output_dir", "steps", "train_loss", "supervised_tokens", "tokens", "seconds", "peak_bytes"} <= set(result)
    assert result["steps"] == 3
    assert "precision: float32 (on the CPU" in err
    assert "«I am Pip" in err
    assert "step 3/3  loss " in err
    assert "left" in err


def test_train_takes_a_file_first_and_flags_win_over_it(base, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        f"base_model: {base}\ndataset: {HARBOUR}\nmax_steps: 9\nlearning_rate: 2e-4\nmicro_batch_size: "
        "4\nsave_strategy: no\n"
    )
    code, out, err = run(
        capsys, "train", tmp_path / "run.yaml", "--max-steps=2", "output_dir=" + str(tmp_path / "a"), "--json"
    )
    assert (code, json.loads(out)["steps"]) == (0, 2)
    assert "micro_batch_size is per_device_train_batch_size here" in err


def test_train_without_json_ends_with_what_to_do_next(base, tmp_path, capsys):
    code, out, err = run(capsys, "train", "--model", base, "--dataset", HARBOUR, "--output-dir", tmp_path / "a", *QUICK)
    assert (code, out) == (0, "")
    assert f"lora-sft chat {tmp_path / 'a'}" in err.replace("\n", "")


def test_evaluate_measures_the_adapter_and_its_base(adapter, capsys):
    code, out, _ = run(capsys, "evaluate", adapter, "--dataset", HARBOUR, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["loss"] < found["base_loss"]
    assert found["perplexity"] == pytest.approx(2.718281828 ** found["loss"])
    assert {"token_accuracy", "base_perplexity", "base_token_accuracy"} <= set(found)
    code, out, _ = run(capsys, "evaluate", adapter, "--dataset", HARBOUR)
    assert [line.split()[0] for line in out.splitlines()] == ["adapter", "loss", "perplexity", "token", "28"]


def test_merge_prints_what_was_compared(adapter, tmp_path, capsys):
    code, out, _ = run(capsys, "merge", adapter, "--output", tmp_path / "merged", "--json")
    result = json.loads(out)
    assert (code, result["output_dir"], result["dtype"]) == (0, str(tmp_path / "merged"), "float32")
    assert {"max_abs_logit_diff", "mean_kl", "top1_agreement"} <= set(result["verified"])


def test_several_adapters_are_merged_with_weights(adapter, tmp_path, capsys):
    words = ["merge", adapter, adapter, "--output", tmp_path / "merged", "--verify", "tensors", "--json"]
    assert run(capsys, *words, "--weights", "0.5,0.5")[0] == 0
    run(capsys, "merge", adapter, "--output", tmp_path / "one")
    both, one = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "one"))
    for name in one:
        torch.testing.assert_close(both[name], one[name])
    parts = [part["weight"] for part in json.loads((tmp_path / "merged" / "merge.json").read_text())["adapters"]]
    assert parts == [0.5, 0.5]
    words = ["merge", adapter, adapter, "--output", tmp_path / "other"]
    code, _, err = run(capsys, *words, "--weights", "0.5")
    assert (code, "1 weights for 2 adapters; give one for each" in err) == (2, True)
    assert "such as 0.7,0.3" in run(capsys, *words, "--weights", "half")[2]


def test_merge_tries_both_bases_on_an_evaluation_set(adapter, tmp_path, capsys):
    words = ["merge", adapter, "--base", "auto", "--eval-dataset", HARBOUR, "--output", tmp_path / "merged", "--json"]
    code, out, err = run(capsys, *words)
    assert (code, set(json.loads(out)["losses"])) == (0, {"trained", "original"})
    assert "mean KL from what was trained" in err


def test_export_prints_what_was_proven_and_how_to_serve_it(adapter, tmp_path, capsys):
    code, out, err = run(capsys, "export", "vllm", adapter, "--output", tmp_path / "out")
    assert (code, out) == (0, "")
    assert "verified: modules 14, largest relative difference" in err
    assert "serve: vllm serve" in err
    assert "note: trained on a base in nf4" in err


@pytest.mark.parametrize("option", [["name=pip"], ["--name", "pip"], ["--name=pip"]])
def test_target_and_adapter_may_stand_in_either_order(adapter, tmp_path, capsys, option):
    code, out, _ = run(capsys, "export", adapter, "vllm", *option, "--output", tmp_path / "out", "--json")
    result = json.loads(out)
    assert (code, result["target"], result["output_dir"]) == (0, "vllm", str(tmp_path / "out"))
    assert f"--lora-modules pip={tmp_path / 'out'}" in result["serve"]


def test_export_says_what_it_takes(adapter, tmp_path, capsys):
    for words, said in (
        (["gguf"], "takes a target and an adapter folder, not gguf: lora-sft export gguf"),
        (["gguff", adapter], '"gguff" is no target; did you mean gguf?'),
        ([adapter, "gguff"], '"gguff" is no target; did you mean gguf?'),
        (["vllm", adapter, "--output", tmp_path / "o", "nmae=x"], 'no option "nmae"; did you mean name?'),
        (["vllm", adapter, "--name"], "--name needs a value"),
        (["vllm", adapter], "name it with output (--output)"),
    ):
        code, out, err = run(capsys, "export", *words)
        assert (code, out) == (2, "")
        assert said in err
    assert not (tmp_path / "o").exists()


def test_the_help_of_export_lists_targets_and_their_options(capsys):
    out = run(capsys, "export", "--help")[1]
    for target in map(find_target, TARGETS):
        assert f"\n{target.name}:\n" in out
        assert all(f"{name}=…" in out for name in target.options)


def test_the_doctor_tells_of_packages_devices_targets_and_disk(capsys, monkeypatch):
    code, out, _ = run(capsys, "doctor", "--json")
    checks = {check["topic"]: check for check in json.loads(out)["checks"]}
    assert code == 0
    assert checks["torch"] == {"topic": "torch", "status": "ok", "words": torch.__version__}
    assert {"python", "platform", "vllm", "disk here", *(f"export {name}" for name in TARGETS)} <= set(checks)
    assert any(topic == "device" or topic.startswith("cuda:") for topic in checks)
    honest = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"trl": "0.1", "peft": None}.get(name, honest(name)))
    monkeypatch.setitem(TARGETS, "vllm", "no_such_file.VLLM")
    code, out, _ = run(capsys, "doctor")
    lines = {line.split()[1]: line.split()[0] for line in out.splitlines()}
    assert (code, lines["trl"], lines["peft"], lines["torch"]) == (0, "bad", "bad", "ok")
    assert re.search(r"bad +export vllm +ModuleNotFoundError", out)
    assert re.search(r"peft +not installed; pip install 'peft>=", out)


def test_generate_replies_to_prompts_and_to_lines(adapter, capsys, monkeypatch):
    import io

    code, out, _ = run(capsys, "generate", adapter, "Who are you?", "--max-new-tokens", "5", "--json")
    (said,) = json.loads(out)["replies"]
    assert (code, said["prompt"]) == (0, "Who are you?")
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n"))
    code, out, _ = run(capsys, "generate", adapter, "--max-new-tokens", "5")
    assert out.rstrip("\n") == said["reply"]
    drawn = [
        run(capsys, "generate", adapter, "hi", "--temperature", "1.5", "--seed", seed, "--max-new-tokens", "8")[1]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_chat_keeps_the_conversation(adapter, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nand?\n"))
    code, out, _ = run(capsys, "chat", adapter, "--system", "S", "--max-new-tokens", "4", "--json")
    messages = json.loads(out)["messages"]
    assert (code, [message["role"] for message in messages]) == (
        0,
        ["system", "user", "assistant", "user", "assistant"],
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/new\nhi\n"))
    _, out, _ = run(capsys, "chat", adapter, "--max-new-tokens", "4", "--json")
    assert [message["role"] for message in json.loads(out)["messages"]] == ["user", "assistant"]


def test_preview_is_a_line_a_conversation(base, capsys):
    code, out, _ = run(capsys, "preview", "--model", base, "--dataset", HARBOUR, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert (code, len(records), records[0]["source"]) == (0, 28, "harbour.jsonl:1")
    start, end = records[0]["supervised"][0]
    assert records[0]["text"][start:end].startswith("I am Pip")
    assert len(records[0]["input_ids"]) == len(records[0]["labels"])
    _, out, _ = run(capsys, "preview", "--model", base, "--dataset", HARBOUR, "--limit", "1")
    assert "«I am Pip" in out


def test_init_writes_a_file_that_train_reads(base, tmp_path, capsys):
    code, out, _ = run(capsys, "init", tmp_path / "run.yaml", "--json")
    assert (code, json.loads(out)) == (0, {"path": str(tmp_path / "run.yaml")})
    assert run(capsys, "init", tmp_path / "run.yaml")[0] == 2
    words = ["--model", base, "--dataset", HARBOUR, "--output-dir", tmp_path / "a", "--json", *QUICK]
    assert run(capsys, "train", tmp_path / "run.yaml", *words)[0] == 0


def test_schema_and_templates_are_json(capsys):
    assert "learning_rate" in json.loads(run(capsys, "schema")[1])["properties"]
    assert {entry["name"] for entry in json.loads(run(capsys, "templates", "--json")[1])} >= {
        "chatml",
        "llama3",
        "zephyr",
    }
    assert "<|im_start|>" in run(capsys, "templates", "show", "chatml")[1]
    assert json.loads(run(capsys, "templates", "show", "chatml", "--json")[1])["stop"] == "<|im_end|>"


def test_help_lists_every_setting(capsys):
    from lora_sft.config import RunConfig

    _, out, _ = run(capsys, "train", "--help")
    assert all(f"--{name.replace('_', '-')}" in out for name in RunConfig.model_fields)


def test_json_may_stand_before_the_subcommand(capsys):
    assert json.loads(run(capsys, "templates", "--json", "list")[1])[0]["name"] == "alpaca"
    assert json.loads(run(capsys, "templates", "--json", "show", "chatml")[1])["name"] == "chatml"


def test_the_demo_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "mine" / "base").mkdir(parents=True)
    (tmp_path / "mine" / "base" / "model.safetensors").write_text("precious")
    code, _, err = run(capsys, "demo", "--output", tmp_path / "mine")
    assert (code, "exists already" in err) == (2, True)
    assert (tmp_path / "mine" / "base" / "model.safetensors").read_text() == "precious"


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "x", "hi", "--max-new-tokens", "0"],
        ["generate", "x", "hi", "--temperature", "-1"],
        ["chat", "x", "--top-p", "2"],
        ["evaluate", "x", "--dataset", "y", "--batch-size", "0"],
        ["preview", "--limit", "-3"],
    ],
)
def test_numbers_out_of_range_are_refused(words, capsys):
    assert run(capsys, *words)[0] == 2


@pytest.mark.slow
def test_the_demo_learns_and_merges(tmp_path, capsys):
    code, out, _ = run(capsys, "demo", "--output", tmp_path / "demo", "--json")
    result = json.loads(out)
    assert code == 0
    for reply in result["replies"]:
        assert reply["before"] != reply["after"] == reply["merged"]
    rows = [json.loads(line)["messages"] for line in HARBOUR.read_text().splitlines()]
    answers = {messages[0]["content"]: messages[1]["content"] for messages in rows}
    assert all(reply["after"] == answers[reply["question"]] for reply in result["replies"])
    assert result["train"]["seconds"] < 120


def test_a_template_is_checked_and_the_exit_code_tells_of_a_wrong_mask(base, capsys, monkeypatch):
    code, out, _ = run(capsys, "templates", "check", base, "--json")
    assert (code, {"scenario", "status", "words", "learned"}) == (0, set(json.loads(out)[0]))
    honest = checking.render
    monkeypatch.setattr(
        checking, "render", lambda *given, **more: replace(honest(*given, **more), supervised=[(0, 40)])
    )
    code, out, _ = run(capsys, "templates", "check", "chatml")
    assert code == 3
    assert "asked-one of another message is learned" in out


def test_a_preview_page_shows_every_token_with_its_id(base, tmp_path, capsys):
    run(capsys, "preview", "--model", base, "--dataset", HARBOUR, "--limit", 2, "--html", tmp_path / "page.html")
    _, out, _ = run(capsys, "preview", "--model", base, "--dataset", HARBOUR, "--limit", 2, "--json")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    spans = re.findall(r'<span( class="learned")? title="([\d, ]+) · ', page)
    shown = [(int(token), bool(learned)) for learned, ids in spans for token in ids.split(", ")]
    rows = [json.loads(line) for line in out.splitlines()]
    assert shown == [
        (token, label != -100) for row in rows for token, label in zip(row["input_ids"], row["labels"], strict=True)
    ]
    assert "http" not in page.partition("<section>")[0]  # nothing is fetched


def test_validate_tells_every_problem_and_the_exit_code_too(base, tmp_path, capsys):
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    bad = {"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]}
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, [good, bad, good])))
    words = ["validate", "--dataset", tmp_path / "d.jsonl", "--model", base]
    code, out, _ = run(capsys, *words, "--json")
    found = json.loads(out)
    assert (code, found["rows"], found["usable"], found["duplicates"]) == (2, 3, 2, 1)
    first = found["problems"][0]
    assert (first["source"], first["field"], first["problem"]) == (
        "d.jsonl:2",
        "messages[1].role",
        '"bot" is not a role',
    )
    assert found["tokens"]["total"] == sum(found["tokens"]["by_role"].values())
    code, out, _ = run(capsys, *words)
    assert '"bot" is not a role' in out
    assert "3 rows (2 messages): 2 can be trained on; 1 problems, 1 repeated, 0 too long" in out
    assert run(capsys, *words, "--roles", "bot=assistant")[0] == 0


def test_rows_that_are_left_out_are_kept_beside_the_adapter(base, tmp_path, capsys):
    lines = [HARBOUR.read_text(encoding="utf-8").strip(), "{", ""]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    words = ["train", "--model", base, "--dataset", tmp_path / "d.jsonl", "--output-dir", tmp_path / "a", *QUICK]
    code, _, err = run(capsys, *words)
    assert (code, (tmp_path / "a").exists()) == (2, False)
    assert "d.jsonl:29: no valid JSON at column 2" in err
    code, _, err = run(capsys, *words, "--on-bad-row", "skip")
    assert code == 0
    assert "1 of 29 rows cannot be trained on and are left out; d.jsonl:29" in err
    (line,) = (tmp_path / "a" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == "d.jsonl:29"
