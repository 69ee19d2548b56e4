"""Every target is asked before anything slow, and its result gets its name only when it holds."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_sft import evaluate, finetune, load
from lora_sft.api import export, merge
from lora_sft.errors import DataError, ModelError, OutputError, SettingError, VerificationError
from lora_sft.exporting import targets
from lora_sft.exporting.export import facts_of, facts_of_job
from lora_sft.exporting.target import Facts, Order, Target
from lora_sft.exporting.targets import TARGETS, find_target
from lora_sft.model.loading import trained_base
from lora_sft.settings import resolve
from lora_sft.training import run as running
from lora_sft.training.job import make_job
from tests.conftest import FEW, HARBOUR


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory):
    """Eight conversations to evaluate on."""
    file = tmp_path_factory.mktemp("data") / "few.jsonl"
    file.write_text("".join(HARBOUR.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(base, few_rows, tmp_path_factory):
    settings = FEW | {"chat_template_kwargs": {"enable_thinking": False}, "eval_dataset": str(few_rows)}
    return finetune(base, HARBOUR, output_dir=tmp_path_factory.mktemp("runs") / "run", **settings)


@pytest.fixture
def adapter(run, tmp_path):
    """A copy of the adapter that a test may spoil."""
    return shutil.copytree(run.output_dir, tmp_path / "adapter")


def change(adapter, **settings):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


class Seen:
    """A target that remembers what it was asked."""

    def __init__(self) -> None:
        self.facts: Facts | None = None
        self.order: Order | None = None
        self.reasons: list[str] = []
        self.holds = True

    def refusals(self, facts, options):
        self.facts = facts
        return self.reasons

    def write(self, order):
        self.order = order
        (order.folder / "served.txt").write_text("weights")
        if not self.holds:
            raise VerificationError("it is another model")
        return {"verified": {"equal": True}, "serve": f"serve {order.output}"}


@pytest.fixture
def made_up(monkeypatch):
    """A target of one file and one line in the table."""
    seen = Seen()

    def add(**more):
        target = Target("made-up", "For tests.", seen.refusals, seen.write, {"size": "of it", "shape": "of it"}, **more)
        monkeypatch.setitem(sys.modules, f"{targets.__package__}.made_up", SimpleNamespace(MADE_UP=target))
        monkeypatch.setitem(TARGETS, "made-up", "made_up.MADE_UP")
        return seen

    return add


@pytest.mark.parametrize("name", TARGETS)
def test_a_line_in_the_table_names_a_target(name):
    target = find_target(name)
    assert target.name == name
    assert target.help.endswith(".")
    assert all(isinstance(words, str) for words in target.needs().values())


def test_a_target_is_one_file_and_one_line(made_up, run, base, tmp_path):
    seen = made_up()
    result = run.export("made-up", tmp_path / "out", base="original", size=3, shape=None)
    assert (tmp_path / "out" / "served.txt").read_text() == "weights"
    assert list(result) == [
        "output_dir",
        "target",
        "base",
        "onto",
        "serve",
        "notes",
        "verified",
        "peak_rss_bytes",
        "seconds",
    ]
    assert (result["output_dir"], result["target"]) == (str(tmp_path / "out"), "made-up")
    assert (result["base"], result["onto"], result["notes"]) == (str(base), "original", [])
    assert result["verified"] == {"equal": True}
    assert result["serve"] == f"serve {tmp_path / 'out'}"
    order = seen.order
    assert (order.adapter, order.output, order.onto, order.options) == (
        run.output_dir,
        tmp_path / "out",
        "original",
        {"size": 3},
    )
    assert order.folder != order.output
    assert (order.spec.quantization, order.spec.double_quant) == ("nf4", True)


def test_the_facts_are_those_of_the_training(made_up, run, tmp_path):
    seen = made_up()
    export(run.output_dir, "made-up", tmp_path / "out")
    facts = seen.facts
    assert facts.adapter["r"] == 8
    assert facts.config.model_type == "llama"
    assert facts.tokenizer.chat_template == run.tokenizer.chat_template
    assert facts.template_variables == {"enable_thinking": False}
    assert not facts.adds_tokens


def test_what_is_known_before_training_is_what_is_known_after_it(base, tmp_path):
    settings = FEW | {"new_tokens": ["<think>"], "lora_r": 4, "chat_template_kwargs": {"a": 1}, "max_steps": 1}
    run = finetune(base, HARBOUR, output_dir=tmp_path / "run", **settings)
    settings.pop("listeners")
    job = make_job(resolve({"model": str(base), "dataset": str(HARBOUR), **settings}))
    before, after = facts_of_job(job), facts_of(run.output_dir, trained_base(run.output_dir))
    assert before.adds_tokens
    assert after.adds_tokens
    assert before.template_variables == after.template_variables == {"a": 1}
    decided = ("r", "use_dora", "bias", "base_model_name_or_path", "rank_pattern", "modules_to_save", "peft_type")
    assert {name: before.adapter[name] for name in decided} == {name: after.adapter[name] for name in decided}


def test_after_pissa_the_rank_is_known_to_be_twice_as_large(base, tmp_path):
    settings = {"lora_init": "pissa", "lora_r": 4, "lora_rank_pattern": {"q_proj": 2}, "max_steps": 1}
    run = finetune(base, HARBOUR, output_dir=tmp_path / "run", **FEW | settings)
    job = make_job(resolve({"model": str(base), "dataset": str(HARBOUR), **settings}))
    before, after = facts_of_job(job).adapter, facts_of(run.output_dir, trained_base(run.output_dir)).adapter
    assert before["r"] == after["r"] == 8
    assert list(before["rank_pattern"].values()) == list(after["rank_pattern"].values()) == [4]


def test_an_exported_adapter_answers_as_the_trained_one(run, base, tmp_path):
    result = export(run.output_dir, "vllm", tmp_path / "out")
    assert result["serve"].startswith(f"vllm serve {base}")
    assert result["verified"]["largest_relative_difference"] < 1e-6
    ids = torch.arange(3, 60).reshape(3, 19)
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.output_dir)(ids).logits
        found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_every_reason_to_refuse_is_given_at_once(adapter, tmp_path):
    change(adapter, use_dora=True, bias="all")
    with pytest.raises(ModelError, match=r"2 problems:\n- vllm: DoRA .* merge instead.*\n- vllm: bias: all"):
        export(adapter, "vllm", tmp_path / "out", force=True)  # its settings were changed
    assert not list(tmp_path.glob("*out*"))


def test_what_was_asked_for_is_checked_before_any_file(made_up, tmp_path):
    made_up(makes_whole_model=False)
    with pytest.raises(SettingError) as refused:
        export("nowhere", "made-up", base="original", sise=3)
    assert str(refused.value).splitlines() == [
        "3 problems:",
        '- made-up has no option "sise"; did you mean size? Known: size, shape',
        "- base original: made-up leaves the base as it is; this is for targets of whole models",
        "- made-up writes a folder: name it with output (--output)",
    ]
    with pytest.raises(SettingError, match='"ggfu" is no target; did you mean gguf'):
        export("nowhere", "ggfu", tmp_path)
    with pytest.raises(SettingError, match="base 'auto' is not one of trained, original"):
        export("nowhere", "made-up", tmp_path, base="auto")


def test_a_folder_without_an_adapter_or_a_used_output_is_refused(made_up, run, tmp_path):
    seen = made_up()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="no adapter here"):
        export(tmp_path, "made-up", tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        export(run.output_dir, "made-up", tmp_path)
    assert seen.order is None


def test_a_result_that_does_not_hold_is_set_aside(made_up, run, tmp_path):
    made_up().holds = False
    with pytest.raises(VerificationError, match="another model; kept as"):
        export(run.output_dir, "made-up", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.refused"]


def test_a_target_that_sends_the_result_away_needs_no_output(made_up, run, tmp_path):
    seen = made_up(keeps_folder=False)
    assert export(run.output_dir, "made-up")["output_dir"] is None
    assert not seen.order.folder.exists()
    assert export(run.output_dir, "made-up", tmp_path / "kept")["output_dir"] == str(tmp_path / "kept")
    assert (tmp_path / "kept" / "served.txt").exists()


def test_what_a_target_would_refuse_is_refused_before_training(base, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "load_base", lambda spec: pytest.fail("weights were read"))
    named = FEW | {"export_to": "vllm,mlx-adapter", "output_dir": tmp_path / "run"}
    with pytest.raises(ModelError, match=r"export_to: vllm: DoRA(.|\n)*export_to: mlx-adapter: DoRA"):
        finetune(base, HARBOUR, use_dora=True, **named)
    with pytest.raises(SettingError, match='"vlm" is no target; did you mean vllm'):
        finetune(base, HARBOUR, **named | {"export_to": ["vlm"]})
    assert not (tmp_path / "run").exists()


def test_the_targets_are_told_what_the_settings_say(made_up, base, tmp_path):
    seen = made_up()
    settings = {"export_to": ["made-up"], "chat_template_kwargs": {"a": 1}, "output_dir": tmp_path / "run"}
    finetune(base, HARBOUR, **FEW | settings)
    assert seen.facts.template_variables == {"a": 1}
    assert seen.order is None, "training exports nothing"
    assert "export_to: [made-up]" in (tmp_path / "run" / "run.yaml").read_text()
    seen.reasons = ["it is too small"]
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ModelError, match=r"^export_to: made-up: it is too small$"):
        finetune(model, HARBOUR, **FEW | settings | {"output_dir": tmp_path / "again"})


def test_a_target_that_is_told_where_to_send_cannot_be_asked_before_training(made_up, base, tmp_path):
    made_up(keeps_folder=False)
    with pytest.raises(SettingError, match="made-up needs options that are given at the export"):
        finetune(base, HARBOUR, export_to=["made-up"], output_dir=tmp_path / "run", **FEW)


def test_auto_measures_both_bases_on_the_set_of_the_run(run, few_rows, tmp_path):
    result = merge(run.output_dir, tmp_path / "merged", base="auto")
    assert set(result["losses"]) == {"trained", "original"}
    assert result["onto"] == min(result["losses"], key=result["losses"].get)
    measured = evaluate(tmp_path / "merged", few_rows, enable_thinking=False)["loss"]
    assert result["losses"][result["onto"]] == pytest.approx(measured, abs=1e-6)
    assert load(run.output_dir).tokenizer.chat_template == load(tmp_path / "merged").tokenizer.chat_template


def test_an_evaluation_set_can_be_given_and_has_one_use(run, tmp_path):
    rows = [json.loads(line) for line in HARBOUR.read_text().splitlines()][:2]
    result = merge(run.output_dir, tmp_path / "merged", base="auto", eval_dataset=rows)
    assert result["losses"] != merge(run.output_dir, tmp_path / "again", base="auto")["losses"]
    with pytest.raises(SettingError, match="eval_dataset is for base: auto"):
        merge(run.output_dir, tmp_path / "third", eval_dataset=rows)
    with pytest.raises(DataError):
        merge(run.output_dir, tmp_path / "third", base="auto", eval_dataset="nowhere.jsonl")


def test_without_the_runs_own_set_the_merge_goes_on(adapter, few_rows, tmp_path, capfd):
    settings = adapter / "run.yaml"
    settings.write_text(settings.read_text().replace(f"eval_dataset: {few_rows}", "eval_dataset: gone.jsonl"))
    result = merge(adapter, tmp_path / "merged", base="auto")
    assert "the run's own eval_dataset cannot be read any more" in capfd.readouterr().err
    assert "losses" not in result
