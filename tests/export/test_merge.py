"""A merged model is the adapter: proven on what was written, and refused when it is not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_sft import finetune, load, merge
from lora_sft.errors import ModelError, OutputError, SettingError, VerificationError
from lora_sft.export import merge as merging
from lora_sft.export.merge import compare
from tests.conftest import FEW, HARBOUR


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return finetune(base, HARBOUR, output_dir=tmp_path_factory.mktemp("runs") / "run", **FEW | {"max_steps": 10})


def test_the_merged_folder_loads_in_plain_transformers(run, tmp_path):
    result = run.merge(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, run.model(**ids).logits, rtol=0, atol=1e-5)
    assert set(result) == {"output_dir", "base", "dtype", "verified", "peak_rss_bytes", "seconds"}
    assert result["verified"]["top1_agreement"] == 1.0
    assert load(tmp_path / "merged").chat("Who are you?", max_new_tokens=5) == run.chat(
        "Who are you?", max_new_tokens=5
    )


def test_the_dtype_can_be_chosen(run, tmp_path):
    merge(run.output_dir, tmp_path / "merged", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    with pytest.raises(SettingError, match="dtype 'int4' is not one of"):
        merge(run.output_dir, tmp_path / "other", dtype="int4")


@pytest.mark.parametrize("mistake", ["another base", "half the update", "a layer left out"])
def test_a_wrong_merge_is_refused_and_set_aside(run, base, tmp_path, mistake, monkeypatch):
    """Each planted mistake is one that is made in the field."""
    write = merging._write

    def write_wrongly(spec, adapter, trained, dtype, folder):
        if mistake == "another base":  # onto the weights before quantization
            trained.quantized.clear()
            trained.quantized.update({"model.layers.0.mlp.up_proj": torch.zeros(128, 64)})
        write(spec, adapter, trained, dtype, folder)
        merged, plain = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
        for name in merged:
            if mistake == "half the update" and "proj" in name:
                merged[name] = (merged[name] + plain[name]) / 2
            if mistake == "a layer left out" and "layers.1." in name:
                merged[name] = plain[name]
        save_file(merged, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(merging, "_write", write_wrongly)
    with pytest.raises(VerificationError, match="is not the adapter: mean KL"):
        merge(run.output_dir, tmp_path / "merged")
    assert {entry.name for entry in tmp_path.iterdir()} == {"merged.refused"}


def test_an_output_folder_that_holds_something_is_refused(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        merge(run.output_dir, tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no adapter here"):
        merge(tmp_path, tmp_path / "merged")


def test_an_adapter_that_does_not_fit_its_base_is_refused(run, tied_base, tmp_path, harbour_texts):
    from lora_sft.model.tiny import save_tiny

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
    with pytest.raises(ModelError, match="does not fit its base"):
        merge(tmp_path / "moved", tmp_path / "merged")


def test_the_comparison_is_counted_by_hand():
    adapter, base = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    found = compare([adapter], [adapter], [base])
    assert (found.max_abs_logit_diff, found.mean_kl, found.top1_agreement) == (0.0, 0.0, 1.0)
    # KL of softmax(0, 1) from softmax(1, 0) is tanh(1/2); the second position does not differ.
    assert found.adapter_effect == pytest.approx(torch.tanh(torch.tensor(0.5)).item() / 2)
    assert compare([base], [adapter], [base]).top1_agreement == 0.5
