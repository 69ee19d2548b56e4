"""A merged model is the adapter: proven on what was written, and refused when it is not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_sft import evaluate, finetune, load, merge
from lora_sft.errors import ModelError, OutputError, SettingError, VerificationError
from lora_sft.merging import losses, quantized
from lora_sft.merging import merge as merging
from lora_sft.merging.fidelity import compare
from lora_sft.model.tiny import save_tiny
from tests.conftest import FEW, HARBOUR


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return finetune(base, HARBOUR, output_dir=tmp_path_factory.mktemp("runs") / "run", **FEW | {"max_steps": 10})


@pytest.fixture(scope="module")
def deep_run(harbour_texts, tmp_path_factory):
    """Six layers of seven projections in bfloat16: 42 modules."""
    folder = tmp_path_factory.mktemp("deep")
    model = save_tiny(folder / "base", harbour_texts, initializer_range=0.05, num_hidden_layers=6, hidden_size=128)
    return finetune(model, HARBOUR, output_dir=folder / "run", **FEW | {"max_steps": 6, "bf16": True})


def test_the_merged_folder_loads_in_plain_transformers(run, tmp_path):
    result = run.merge(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, run.model(**ids).logits, rtol=0, atol=1e-5)
    assert set(result) == {"output_dir", "base", "onto", "dtype", "verified", "peak_rss_bytes", "seconds"}
    assert result["verified"]["top1_agreement"] == 1.0
    assert result["verified"]["weights"] == {
        "tensors": 21, "edited": 14, "failing": 0, **{k: pytest.approx(v, abs=1e-3) for k, v in NEAR.items()}
    }  # fmt: skip
    assert load(tmp_path / "merged").chat("Who are you?", max_new_tokens=5) == run.chat(
        "Who are you?", max_new_tokens=5
    )


NEAR = {"least_kept": 1.0, "most_apart": 0.0}


def test_the_dtype_can_be_chosen(run, tmp_path):
    merge(run.output_dir, tmp_path / "merged", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(SettingError, match="dtype 'int4' is not one of"):
        merge(run.output_dir, tmp_path / "other", dtype="int4")


def plant(mistake, monkeypatch, base):
    """Each planted mistake is one that is made in the field."""
    write = merging.write_model

    def write_wrongly(merged, folder, dtype):
        if mistake == "single quantization":  # of a base that was trained with double
            monkeypatch.setattr(quantized._FourBit, "_rounded_scales", lambda self: None)
        write(merged, folder, dtype)
        if mistake == "single quantization":
            return
        file = folder / "model.safetensors"
        written, plain = load_file(file), load_file(base / "model.safetensors")
        for name in written:
            if "proj" in name and mistake == "alpha halved":
                trained = merged.base.rows(name)(0, len(written[name]))
                written[name] = ((written[name].float() + trained) / 2).to(written[name].dtype)
            if name.endswith("layers.3.self_attn.v_proj.weight") and mistake == "one module of 42 forgotten":
                written[name] = merged.base.rows(name)(0, len(written[name])).to(written[name].dtype)
            if "proj" in name and mistake == "the other base":
                trained = merged.base.rows(name)(0, len(written[name]))
                written[name] = (written[name].float() - trained + plain[name].float()).to(written[name].dtype)
        save_file(written, file, {"format": "pt"})

    monkeypatch.setattr(merging, "write_model", write_wrongly)


@pytest.mark.parametrize(
    "mistake", ["single quantization", "one module of 42 forgotten", "alpha halved", "the other base"]
)
def test_a_wrong_merge_is_refused_and_set_aside(deep_run, tmp_path, mistake, monkeypatch):
    plant(mistake, monkeypatch, deep_run.output_dir.parent / "base")
    with pytest.raises(VerificationError, match="tensors are not what they must be") as refused:
        merge(deep_run.output_dir, tmp_path / "merged")
    assert f"kept as {tmp_path / 'merged.refused'}" in str(refused.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"merged.refused"}


@pytest.mark.parametrize("mistake", ["one module of 42 forgotten", "alpha halved", "the other base"])
def test_it_is_refused_without_loading_a_model_too(deep_run, tmp_path, mistake, monkeypatch):
    plant(mistake, monkeypatch, deep_run.output_dir.parent / "base")
    with pytest.raises(VerificationError, match="tensors are not what they must be"):
        merge(deep_run.output_dir, tmp_path / "merged", verify="tensors")


@pytest.mark.parametrize("way", ["logits", "tensors"])
def test_a_right_merge_in_16_bits_holds(deep_run, tmp_path, way):
    result = merge(deep_run.output_dir, tmp_path / "merged", verify=way)
    assert result["dtype"] == "bfloat16"
    assert result["verified"]["how"] == way
    assert result["verified"]["weights"]["edited"] == 42
    if way == "logits":
        assert result["verified"]["mean_kl"] < 1e-4


def test_the_base_of_a_qlora_adapter_can_be_chosen(run, base, tmp_path):
    trained = merge(run.output_dir, tmp_path / "trained")
    original = merge(run.output_dir, tmp_path / "original", base="original")
    assert (trained["onto"], original["onto"]) == ("trained", "original")
    changed = original["verified"]["against_trained_base"]["mean_kl"]
    assert original["verified"]["mean_kl"] < 1e-9  # against the adapter on that base, it is right
    assert changed > 1e-4  # but it is not what was trained
    plain = load_file(base / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(load_file(tmp_path / "original" / "model.safetensors")[name], plain[name])


def test_auto_makes_both_and_keeps_the_one_with_the_lower_loss(run, tmp_path, capfd, monkeypatch):
    numbers = {".trained": 2.0, ".original": 1.5}
    monkeypatch.setattr(losses, "losses_on", lambda *_: lambda folder: numbers[folder.name])
    result = merge(run.output_dir, tmp_path / "merged", base="auto")
    said = capfd.readouterr().err
    assert "trained" in said
    assert "1.5000" in said
    assert result["onto"] == "original"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size
    assert result["losses"] == {"trained": 2.0, "original": 1.5}


def test_the_losses_are_those_of_an_evaluation(run, tmp_path):
    result = merge(run.output_dir, tmp_path / "merged", base="auto", eval_dataset=str(HARBOUR))
    assert set(result["losses"]) == {"trained", "original"}
    best = min(result["losses"], key=result["losses"].get)
    assert result["onto"] == best
    assert evaluate(tmp_path / "merged", HARBOUR)["loss"] == pytest.approx(result["losses"][best], rel=1e-4)
    assert merge(run.output_dir, tmp_path / "again", base="auto")["onto"] == "trained"  # nothing to measure on
    with pytest.raises(SettingError, match="eval_dataset is for base: auto"):
        merge(run.output_dir, tmp_path / "other", eval_dataset=str(HARBOUR))


def test_quantizing_again_comes_last_and_says_what_it_loses(run, tmp_path, capfd):
    result = merge(run.output_dir, tmp_path / "merged", quantize="nf4")
    assert "quantized: to nf4, against the adapter: mean KL" in capfd.readouterr().err
    assert result["verified"]["mean_kl"] < 1e-9
    assert result["verified"]["after_quantizing"]["mean_kl"] > 1e-6
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    assert "model.layers.0.mlp.up_proj.weight.absmax" in load_file(tmp_path / "merged" / "model.safetensors")


def test_the_inputs_are_left_as_they_were(run, base, tmp_path):
    def bytes_of(folder):
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}

    before = bytes_of(run.output_dir), bytes_of(base)
    run.merge(tmp_path / "merged")
    assert (bytes_of(run.output_dir), bytes_of(base)) == before


def test_the_settings_of_the_base_are_patched_not_written_anew(run, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    shutil.copytree(base, tmp_path / "base")
    published = {**config, "rope_theta": 12345.0, "a_field_of_another_reader": [1, 2]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(published))
    adapter = tmp_path / "adapter"
    shutil.copytree(run.output_dir, adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    merge(adapter, tmp_path / "merged", verify="no", force=True)  # the base was changed
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == published | {"dtype": "float32"}


def test_an_output_folder_that_holds_something_is_refused(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        merge(run.output_dir, tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no adapter here"):
        merge(tmp_path, tmp_path / "merged")


def test_an_adapter_that_does_not_fit_its_base_is_refused(run, tmp_path, harbour_texts):
    narrow = save_tiny(tmp_path / "narrow", harbour_texts, hidden_size=32)
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / "moved" / name).write_bytes((run.output_dir / name).read_bytes())
    config = json.loads((tmp_path / "moved" / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": str(narrow)
    }
    (tmp_path / "moved" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"does not fit its base: model.layers.0.self_attn.q_proj.weight: the adapter"):
        merge(tmp_path / "moved", tmp_path / "merged")


def test_the_comparison_is_counted_by_hand():
    adapter, base = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    found = compare([adapter], [adapter], [base])
    assert (found.max_abs_logit_diff, found.mean_kl, found.top1_agreement) == (0.0, 0.0, 1.0)
    # KL of softmax(0, 1) from softmax(1, 0) is tanh(1/2); the second position does not differ.
    assert found.adapter_effect == pytest.approx(torch.tanh(torch.tensor(0.5)).item() / 2)
    worse = compare([base], [adapter], [base])
    assert (worse.top1_agreement, worse.share_lost) == (0.5, 1.0)
    assert worse.max_kl == pytest.approx(2 * worse.mean_kl)
