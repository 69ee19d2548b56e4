"""The card tells whoever chooses a model what it is, how it was made and how it is served; and nothing of our disk."""

import json
import re
import shutil
from dataclasses import asdict

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from lora_sft import finetune
from lora_sft.config import RunConfig
from lora_sft.exporting import vllm
from lora_sft.merging.fidelity import Fidelity
from lora_sft.model.base import keep_weights_unpacked
from lora_sft.model.tiny import tiny_model
from lora_sft.publishing import card as card_module
from lora_sft.publishing.card import _curve_table, card_of, licence_in, merged_card, model_card, verification_line
from lora_sft.publishing.public import read_json
from tests.conftest import FEW, HARBOUR

VERIFIED = {
    "max_abs_logit_diff": 2.1e-6,
    "mean_kl": 5.7e-14,
    "max_kl": 1.2e-12,
    "top1_agreement": 1.0,
    "adapter_effect": 0.0615,
    "share_lost": 0.00123,
}


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    settings = FEW | {"eval_size": 3, "eval_strategy": "steps", "eval_steps": 1, "load_in_4bit": True}
    return finetune(base, HARBOUR, output_dir=tmp_path_factory.mktemp("mine") / "harbour", **settings)


@pytest.fixture(scope="module")
def manifest(run) -> dict:
    return read_json(run.output_dir / "manifest.json")


def front_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def python_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.S).group(1)


def row(card: str, name: str) -> str:
    return re.search(rf"^\| {name} \| (.*) \|$", card, re.M).group(1)


def test_the_card_says_how_the_adapter_came_about(run, manifest):
    card = card_of(run.output_dir, "someone/harbour", base="org/tiny")
    assert row(card, "base") == "`org/tiny`"
    assert row(card, "base in training") == "nf4 with double quantization, float32"
    assert row(card, "adapter").startswith("rank 8, alpha 32, on down_proj gate_proj")
    assert manifest["data"]["sha256"] in row(card, "hash of the data")
    assert manifest["chat_template_sha256"] in row(card, "hash of the chat template")
    assert f"{manifest['data']['supervised_tokens']:,} of their" in row(card, "data")
    assert f"peft {manifest['versions']['peft']}" in row(card, "software")
    assert f"Evaluation loss {manifest['result']['eval_loss']:.4f}" in card
    assert "A reply ends with `<|im_end|>`" in card
    assert "learning_rate: 0.005" in card


def test_the_front_matter_is_what_the_hub_expects(run):
    front = front_of(card_of(run.output_dir, "someone/harbour", base="org/tiny", licence={"license": "mit"}))
    assert front == {
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft", "lora_sft"],
    }


def test_neither_card_names_a_folder_of_this_machine(run, manifest, base):
    config = RunConfig.model_validate(yaml.safe_load((run.output_dir / "run.yaml").read_text()))
    here = dict(base=str(base), dtype="float32", adapters=[str(run.output_dir)], config=config)
    for card in (
        (run.output_dir / "README.md").read_text(),
        card_of(run.output_dir, "harbour"),
        merged_card(manifest, VERIFIED, "merged", **here),
    ):
        assert not re.search(r"(^|[\s\"'`])/\w", card, re.M)
        assert "base_model:" not in card  # a folder has no page on the hub
        assert f"`{base.name}`" in card


def test_a_commit_is_told_of_the_base_that_it_belongs_to(manifest):
    known = manifest | {"base": manifest["base"] | {"name": "org/tiny", "commit": "abc123"}}
    assert "at commit `abc123`" in model_card(known, None, "x")
    assert "abc123" not in model_card(known, None, "x", base="org/other")


def test_data_sets_of_the_hub_are_linked_and_files_are_not():
    config = RunConfig(dataset=["org/chats", "mine.jsonl", "data/mine.csv", {"path": "org/more", "weight": 1.0}])
    assert front_of(model_card(None, config, "x"))["datasets"] == ["org/chats", "org/more"]


def test_what_the_card_says_loads_the_adapter_as_it_was_trained(run, monkeypatch, capsys):
    monkeypatch.chdir(run.output_dir.parent)
    load, talk = python_of(card_of(run.output_dir, "harbour")).split("messages =")
    names: dict = {}
    exec(load, names)
    keep_weights_unpacked(names["model"])  # else this CPU may compute in bfloat16
    exec("messages =" + talk, names)
    with torch.no_grad():
        ours, theirs = (model(**names["prompt"]).logits for model in (run.model, names["model"]))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert capsys.readouterr().out


def test_what_the_card_says_loads_the_merged_model(base, manifest, monkeypatch, capsys):
    monkeypatch.chdir(base.parent)
    names: dict = {}
    exec(python_of(merged_card(manifest, VERIFIED, base.name, base="org/tiny", dtype="float32")), names)
    weights = names["model"].state_dict()
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(weights[name], tensor)
    assert capsys.readouterr().out


def test_the_merged_card_tells_base_weights_and_verification(manifest):
    card = merged_card(manifest, VERIFIED, "someone/merged", base="org/tiny", dtype="bfloat16", adapters=["a", "b"])
    assert (front_of(card)["base_model_relation"], front_of(card)["library_name"]) == ("finetune", "transformers")
    assert row(card, "merged onto") == "the base as trained: the values that its nf4 weights stand for"
    assert row(card, "weights") == "bfloat16"
    assert "`a`, `b`" in card
    assert verification_line(VERIFIED) in card
    assert "vllm serve someone/merged" in card
    other = merged_card(
        manifest, {"how": "not"}, "x", base="org/tiny", dtype="float16", onto="original", quantize="nf4"
    )
    assert row(other, "merged onto") == "the original base, though it was nf4 in training"
    assert row(other, "weights") == "float16, then quantized to nf4"
    assert "Not compared with the adapter" in other


def test_the_verification_is_the_line_that_the_merge_prints():
    measured = Fidelity(**{name: value for name, value in VERIFIED.items() if name != "share_lost"})
    assert verification_line(asdict(measured) | {"share_lost": measured.share_lost}) == str(measured)
    tensors = {"how": "tensors", "weights": {"tensors": 9, "edited": 7, "failing": 0, "least_kept": 1.0}, "holds": True}
    assert verification_line(tensors) == "7 of 9 tensors changed, 0 not as they must be"
    assert verification_line({"how": "not", "holds": True}) == ""
    assert verification_line({"mean_kl": 1e-3, "max_kl": None}) == "mean KL 1.0e-03"


def test_an_adapter_that_was_trained_elsewhere_has_a_card_too(tmp_path):
    model = get_peft_model(
        tiny_model(64), LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only", use_rslora=True)
    )
    model.save_pretrained(tmp_path / "found")
    card = card_of(tmp_path / "found", "someone/found", base="org/tiny")
    assert ModelCard(card).data.base_model == "org/tiny"
    assert row(card, "adapter") == "rank 4, alpha 8, on q_proj, rsLoRA, biases"
    assert "vllm" not in card  # it would scale this one wrongly
    for unknown in ("## Results", "## Settings", "None", "trained by"):
        assert unknown not in card


def test_vllm_is_named_with_the_rank_that_it_must_be_told(run):
    card = card_of(run.output_dir, "someone/harbour", base="org/tiny")
    assert "vllm serve org/tiny --enable-lora --max-lora-rank 8 --lora-modules harbour=someone/harbour" in card
    assert card_module.RANK_STEPS == vllm.RANK_STEPS
    wide = {"r": 20, "lora_alpha": 20, "target_modules": ["q_proj"]}
    assert "--max-lora-rank 32" in model_card(None, None, "a/b", adapter=wide, base="org/tiny")
    for odd in ({"use_dora": True}, {"rank_pattern": {"q_proj": 4}}, {"modules_to_save": ["lm_head"]}, {"r": 600}):
        assert "vllm" not in model_card(None, None, "a/b", adapter=wide | odd, base="org/tiny")


def test_the_curve_is_a_short_table_with_both_ends():
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 101)] + [{"step": 100, "eval_loss": 0.5}]
    table = _curve_table(lines)
    assert table[1:4] == ["| step | training loss | evaluation loss |", "|---:|---:|---:|", "| 1 | 1.0000 |  |"]
    assert table[-1] == "| 100 | 0.0100 | 0.5000 |"
    assert len(table) == 3 + 8
    assert _curve_table(lines[:1]) == []


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: ours\nlicense_link: https://example.org\n---\n",
            {"license": "other", "license_name": "ours", "license_link": "https://example.org"},
        ),
        ("# no front matter\n", {}),
        ("---\nlicense: [a\n---\n", {}),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", {}),
        ("---\njust words\n---\n", {}),
    ],
)
def test_the_licence_is_read_off_the_front_of_the_bases_card(card, found):
    assert licence_in(card) == found


def test_the_licence_beside_a_base_in_a_folder_is_taken(run, base, tmp_path):
    licensed = shutil.copytree(base, tmp_path / "licensed")
    (licensed / "README.md").write_text("---\nlicense: mit\n---\n")
    card = card_of(run.output_dir, "x", base=str(licensed))
    assert row(card, "licence") == "mit (that of the base)"
    assert front_of(card)["license"] == "mit"
    assert "that of the base applies" in row(card_of(run.output_dir, "x"), "licence")


def test_a_secret_among_the_settings_is_not_told():
    config = RunConfig(training_args={"hub_token": "hf_x", "logging_dir": "/home/anna/logs", "adam_beta2": 0.95})
    card = model_card(None, config, "x")
    assert 'training_args: {"logging_dir": "logs", "adam_beta2": 0.95}' in card
    assert "hf_x" not in json.dumps(card)
