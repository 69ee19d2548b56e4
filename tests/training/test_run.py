"""A run can be repeated, resumed and taken elsewhere; its folder tells how it came about."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_sft import finetune, load
from lora_sft.errors import ModelError, OutputError, SettingError
from lora_sft.model.loading import trained_base
from lora_sft.settings import resolve
from lora_sft.training.trainer import build_trainer
from tests.conftest import FEW, HARBOUR, logged, sums


def adapter_bytes(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return finetune(
        base,
        HARBOUR,
        output_dir=tmp_path_factory.mktemp("runs") / "first",
        **FEW | {"max_steps": 5, "lora_dropout": 0.1},
    )


def test_the_same_run_twice_is_bit_identical_and_run_yaml_gives_it_a_third_time(run, base, tmp_path):
    again = finetune(base, HARBOUR, output_dir=tmp_path / "again", **FEW | {"max_steps": 5, "lora_dropout": 0.1})
    third = finetune(config=run.output_dir / "run.yaml", output_dir=tmp_path / "third", listeners=())
    assert adapter_bytes(run.output_dir) == adapter_bytes(again.output_dir) == adapter_bytes(third.output_dir)


def test_run_yaml_holds_in_another_folder(base, tmp_path, monkeypatch):
    shutil.copy(HARBOUR, tmp_path / "data.jsonl")
    here = finetune(base, "data.jsonl", output_dir="here", **FEW)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    there = finetune(config=here.output_dir / "run.yaml", output_dir="there", listeners=())
    assert adapter_bytes(here.output_dir) == adapter_bytes(there.output_dir)


def test_another_seed_is_another_adapter(run, base, tmp_path):
    other = finetune(
        base, HARBOUR, output_dir=tmp_path / "other", **FEW | {"max_steps": 5, "lora_dropout": 0.1, "seed": 1}
    )
    assert adapter_bytes(run.output_dir) != adapter_bytes(other.output_dir)


def test_the_adapter_loads_in_plain_peft_on_the_plain_base_with_equal_logits(run, base):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, run.output_dir)
    ids = AutoTokenizer.from_pretrained(run.output_dir)("Who are you?", return_tensors="pt")["input_ids"]
    # In training mode, without dropout: bitsandbytes repacks weights in eval mode on some CPUs.
    plain.train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(plain(input_ids=ids).logits, run.model(input_ids=ids).logits)


def test_the_folder_holds_what_is_promised(run, base):
    assert {file.name for file in run.output_dir.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
        "trainer_state.json",
        "start.json",
        "run.yaml",
        "manifest.json",
        "metrics.jsonl",
        "report.html",
    }
    config = json.loads((run.output_dir / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"], config["revision"]) == (
        str(base),
        "CAUSAL_LM",
        None,
    )
    manifest = json.loads((run.output_dir / "manifest.json").read_text())
    assert manifest["base"]["quantization"] == "nf4"
    assert manifest["base"]["double_quant"] is True
    assert manifest["data"]["examples"] == 28
    assert manifest["result"] == run.metrics
    assert len(logged(run.output_dir)) == 5


def test_the_card_says_what_it_is_and_names_no_local_path(run, base):
    card = (run.output_dir / "README.md").read_text()
    assert "nf4 with double quantization" in card
    assert str(base) not in card
    assert str(run.output_dir) not in card


def test_every_setting_is_in_run_yaml_as_resolved(run, base):
    from lora_sft.settings import read_file

    config = resolve(read_file(run.output_dir / "run.yaml"))
    assert (config.load_in_4bit, config.bf16, config.device) == (True, False, "cpu")
    assert (config.model_name_or_path, config.dataset, config.max_steps, config.lora_r) == (
        str(base),
        str(HARBOUR),
        5,
        8,
    )


def test_no_secret_and_no_pickle_is_left_in_the_folder(run):
    assert not list(run.output_dir.rglob("*.bin"))


def test_a_loaded_model_is_trained_in_place(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    run = finetune(model, sums(4), tokenizer=AutoTokenizer.from_pretrained(base), output_dir=tmp_path / "run", **FEW)
    assert run.model.get_base_model() is model
    assert "The conversations were given as objects" in (run.output_dir / "run.yaml").read_text()
    assert load(run.output_dir).chat("hi", max_new_tokens=3) == run.chat("hi", max_new_tokens=3)


def test_a_loaded_model_is_not_quantized_behind_your_back(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with pytest.raises(ModelError, match="cannot be quantized any more; give its folder or hub name"):
        finetune(model, sums(4), tokenizer=tokenizer, output_dir=tmp_path / "run", **FEW | {"load_in_4bit": True})


def test_code_that_comes_with_a_base_never_runs_because_an_adapter_says_so(run, tmp_path):
    moved = shutil.copytree(run.output_dir, tmp_path / "moved")
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["base"]["trust_remote_code"] = True
    (moved / "manifest.json").write_text(json.dumps(manifest))
    assert trained_base(moved).trust_remote_code is False
    assert trained_base(moved, trust_remote_code=True).trust_remote_code is True


def test_a_base_that_moved_is_named_in_the_adapters_config(run, tied_base, tmp_path):
    moved = shutil.copytree(run.output_dir, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(tied_base)}
    (moved / "adapter_config.json").write_text(json.dumps(config))
    assert trained_base(moved).name == str(tied_base)


def test_the_recorded_commit_is_what_is_loaded(run, tmp_path):
    moved = shutil.copytree(run.output_dir, tmp_path / "moved")
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["base"] |= {"revision": "main", "commit": "abc123"}
    (moved / "manifest.json").write_text(json.dumps(manifest))
    assert trained_base(moved).revision == "abc123"


def test_whole_modules_are_trained_in_float32_too(base, tmp_path, monkeypatch):
    """In bfloat16 an update far below a rounding step would be lost."""
    seen = []
    monkeypatch.setattr(
        "lora_sft.training.run.build_trainer",
        lambda model, *rest: seen.extend(model.named_parameters()) or build_trainer(model, *rest),
    )
    run = finetune(
        base, sums(4), output_dir=tmp_path / "run", **FEW | {"bf16": True, "lora_modules_to_save": "lm_head"}
    )
    assert {p.dtype for name, p in load_file(run.output_dir / "adapter_model.safetensors").items()} == {torch.float32}
    assert len([name for name, _ in seen if "modules_to_save" in name]) == 1
    assert run.chat("hi", max_new_tokens=2) is not None


def test_variables_of_the_template_are_remembered(base, tmp_path):
    template = (base / "chat_template.jinja").read_text()
    (tmp_path / "loud.jinja").write_text(template + "{% if loud %}LOUD{% endif %}")
    settings = FEW | {"chat_template": str(tmp_path / "loud.jinja"), "chat_template_kwargs": {"loud": True}}
    run = finetune(base, sums(4), output_dir=tmp_path / "run", **settings)
    assert load(run.output_dir).template_variables == run.template_variables == {"loud": True}


def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(base, tmp_path):
    whole = finetune(
        base,
        sums(12),
        output_dir=tmp_path / "whole",
        **FEW | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3},
    )
    settings = FEW | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    folder = tmp_path / "broken"

    class PowerCut:
        def started(self, total_steps, first_step): ...
        def logged(self, step, metrics): ...
        def ended(self): ...
        def stepped(self, step):
            if step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(base, sums(12), output_dir=folder, **settings | {"listeners": [PowerCut()]})
    assert not (folder / "manifest.json").exists()
    resumed = finetune(base, sums(12), output_dir=folder, resume_from_checkpoint=True, **settings)
    assert adapter_bytes(resumed.output_dir) == adapter_bytes(whole.output_dir)
    for ours, theirs in zip(logged(folder), logged(tmp_path / "whole"), strict=True):
        assert all(ours[name] == theirs[name] for name in theirs if name != "tokens_per_second")
    for name in ("steps", "tokens", "supervised_tokens", "first_loss", "last_loss"):
        assert resumed.metrics[name] == whole.metrics[name]


def test_the_best_adapter_is_kept_and_training_stops_early(base, tmp_path):
    settings = {
        "max_steps": 40,
        "eval_dataset": sums(3),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "early_stopping_patience": 1,
        "load_best_model_at_end": True,
        "learning_rate": 0.05,
    }
    run = finetune(base, HARBOUR, output_dir=tmp_path / "run", **FEW | settings)
    losses = [line["eval_loss"] for line in logged(run.output_dir) if "eval_loss" in line]
    assert run.metrics["steps"] < 40
    assert losses[-1] > losses[-2]
    assert run.metrics["eval_loss"] == min(losses)
    best = load_file(sorted(run.output_dir.glob("checkpoint-*"))[0] / "adapter_model.safetensors")
    kept = load_file(run.output_dir / "adapter_model.safetensors")
    assert any(
        all(torch.equal(kept[name], tensor[name]) for name in kept)
        for tensor in (
            load_file(folder / "adapter_model.safetensors") for folder in run.output_dir.glob("checkpoint-*")
        )
    )
    assert set(best) == set(kept)


def test_a_folder_in_use_is_refused_and_left_alone(run, base):
    before = {file.name: file.stat().st_mtime_ns for file in run.output_dir.iterdir()}
    with pytest.raises(SettingError, match=r"lora_dropout: 0\.1 → 0\.0; max_steps: 5 → 3\. Name another output_dir"):
        finetune(base, HARBOUR, output_dir=run.output_dir, **FEW)
    with pytest.raises(OutputError, match="holds a finished run; name another folder"):
        finetune(base, HARBOUR, output_dir=run.output_dir, resume_from_checkpoint=False, **FEW)
    assert {file.name: file.stat().st_mtime_ns for file in run.output_dir.iterdir()} == before


def test_without_an_output_folder_the_next_free_number_is_taken(base, tmp_path):
    (tmp_path / "runs" / "007").mkdir(parents=True)
    assert finetune(base, sums(4), **FEW).output_dir == tmp_path / "runs" / "008"
