"""R18, R19: parts that do not belong together are refused before weights; what was changed is refused unless forced."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_sft import evaluate, export, finetune, load, merge
from lora_sft.cli import main
from lora_sft.errors import ModelError, SettingError, UsageError
from lora_sft.model.tiny import save_tiny, tiny_tokenizer
from tests.conftest import FEW, HARBOUR


@pytest.fixture(scope="module")
def base(tmp_path_factory, harbour_texts):
    """A base of this file's own: some tests move it."""
    return save_tiny(tmp_path_factory.mktemp("own") / "base", harbour_texts, initializer_range=0.08)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return finetune(base, HARBOUR, output_dir=tmp_path_factory.mktemp("runs") / "run", **FEW)


@pytest.fixture
def adapter(run, tmp_path):
    """A copy of the run's folder, to be spoiled."""
    return shutil.copytree(run.output_dir, tmp_path / "adapter")


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


# --- R18 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_length": -5}, "max_length: -5: input should be greater than or equal to 2"),
        ({"max_length": 0}, "max_length"),
        ({"lora_alpha": 0}, "lora_alpha: 0: input should be greater than 0"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_r": 0}, "lora_r"),
        ({"lora_r": -8}, "lora_r"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"learning_rate": -1e-4}, "learning_rate"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate: inf is no number to compute with"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"num_train_epochs": 0}, "num_train_epochs"),
        ({"lora_rank_pattern": {"q_proj": 0}}, "lora_rank_pattern"),
        ({"lora_alpha_pattern": {"q_proj": 0}}, "lora_alpha_pattern"),
        ({"lora_target_modules": "q_proj,v_porj"}, "v_porj matches nothing in this model; did you mean v_proj?"),
        ({"lora_target_modules": "q_porj,v_porj"}, "q_porj matches nothing"),
        ({"lora_target_modules": "nothing.*"}, "matches no module"),
        ({"lora_target_modules": "(q_proj"}, "is no regex"),
        ({"lora_target_modules": "(_*[a-z]*)*_*_*[a-z]*!"}, "takes more than 5 s"),
        ({"lora_rank_pattern": {"v_porj": 4}}, "v_porj matches nothing"),
        ({"lora_modules_to_save": "embed_token"}, "embed_token matches nothing"),
        ({"lora_config": {"layers_to_transform": [99]}}, "cannot be used when `target_modules` is a str"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_weights(settings, words, base, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UsageError) as refused:
        finetune(base, HARBOUR, output_dir=tmp_path / "run", **FEW | settings)
    assert words in str(refused.value)


def test_a_tokenizer_that_is_larger_than_the_embeddings_is_refused(base, harbour_texts, tmp_path, monkeypatch):
    larger = shutil.copytree(base, tmp_path / "base")
    tiny_tokenizer(harbour_texts, 900).save_pretrained(larger)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match=r"the tokenizer knows \d+ tokens, the model embeds 512"):
        finetune(larger, HARBOUR, output_dir=tmp_path / "run", **FEW)


@pytest.mark.parametrize("ids", [{"eos_token_id": 300}, {"eos_token_id": [300, 400], "bos_token_id": 5000}])
def test_the_tokenizer_of_another_model_is_refused(ids, base, tmp_path, monkeypatch):
    """In it, the tokens that begin and end the texts of this model are words."""
    other = shutil.copytree(base, tmp_path / "base")
    (other / "generation_config.json").write_text(json.dumps(ids))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match=r"the tokenizer belongs to another model: .*eos 300 is "):
        finetune(other, HARBOUR, output_dir=tmp_path / "run", **FEW)


# --- R19 --------------------------------------------------------------------------------------------------


def refused(adapter, tmp_path, words):
    """Merge and export refuse alike."""
    with pytest.raises(ModelError) as error:
        merge(adapter, tmp_path / "merged")
    assert words in str(error.value)
    with pytest.raises(ModelError) as error:
        export(adapter, "vllm", tmp_path / "exported")
    assert words in str(error.value)
    assert not (tmp_path / "merged").exists()


def test_another_base_of_the_same_shape_is_refused(adapter, base, harbour_texts, tmp_path, capfd):
    other = save_tiny(tmp_path / "other", harbour_texts, seed=1, initializer_range=0.08)
    change(adapter / "adapter_config.json", base_model_name_or_path=str(other))
    refused(adapter, tmp_path, "is another model than the one that the adapter was trained on")
    for force, code in (((), 2), (("--force",), 0)):
        with pytest.raises(SystemExit) as ended:
            main(["merge", str(adapter), "--output", str(tmp_path / "merged"), *force])
        assert ended.value.code == code
    assert "is another model" in capfd.readouterr().err
    load(adapter)
    assert "is another model" in capfd.readouterr().err
    evaluate(adapter, HARBOUR)
    assert "is another model" in capfd.readouterr().err


def test_a_base_whose_weights_were_changed_in_place_is_refused(adapter, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "base")
    change(adapter / "adapter_config.json", base_model_name_or_path=str(moved))
    merge(adapter, tmp_path / "as it was")  # a copy is the same base
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    refused(adapter, tmp_path, "is another model")


@pytest.mark.parametrize(
    "edit",
    [
        {"lora_alpha": 64},
        {"r": 4},
        {"use_rslora": True},
        {"target_modules": ["q_proj"]},
        {"alpha_pattern": {"q_proj": 4}},
        {"fan_in_fan_out": True},
    ],
)
def test_edited_settings_are_refused(edit, adapter, tmp_path):
    change(adapter / "adapter_config.json", **edit)
    refused(adapter, tmp_path, "was changed after the training")


def test_an_edited_alpha_is_merged_by_force(adapter, run, base, tmp_path):
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    change(adapter / "adapter_config.json", lora_alpha=2 * alpha)
    merge(adapter, tmp_path / "twice", base="original", force=True)
    merge(run.output_dir, tmp_path / "once", base="original")
    name = "model.layers.0.self_attn.q_proj.weight"
    plain, once, twice = (
        load_file(one / "model.safetensors")[name] for one in (base, tmp_path / "once", tmp_path / "twice")
    )
    torch.testing.assert_close(twice - plain, 2 * (once - plain), rtol=0, atol=1e-6)


def test_other_weights_are_refused(adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    refused(adapter, tmp_path, "is not the file that the training wrote")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_is_refused_even_by_force(number, adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = number
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(adapter, tmp_path, "holds NaN or infinity")
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        merge(adapter, tmp_path / "merged", force=True)
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        load(adapter)


def test_a_double_merge_is_refused(adapter, run, tmp_path):
    merge(run.output_dir, tmp_path / "once")
    change(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "once"))
    refused(adapter, tmp_path, "this adapter is merged into it already")
    (adapter / "manifest.json").unlink()  # as an adapter of which nothing is known
    refused(adapter, tmp_path, "this adapter is merged into it already")
    merge(adapter, tmp_path / "twice", force=True)


def test_an_adapter_that_matches_nothing_is_refused(adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "manifest.json").unlink()
    for other in (
        {name.replace(".layers.", ".blocks."): tensor for name, tensor in tensors.items()},
        {name: tensor for name, tensor in tensors.items() if ".layers.0." in name},
        {},
    ):
        save_file(other, adapter / "adapter_model.safetensors")
        with pytest.raises(ModelError):
            merge(adapter, tmp_path / "merged", force=True)
        with pytest.raises(ModelError):
            load(adapter)
    save_file(tensors, adapter / "adapter_model.safetensors")
    change(adapter / "adapter_config.json", target_modules=["attention"])
    with pytest.raises(ModelError):
        load(adapter)


def test_what_was_not_changed_is_merged(run, tmp_path):
    """Saving the tokenizer again, or another name for the base's folder, is no change of the adapter."""
    copy = shutil.copytree(run.output_dir, tmp_path / "copy")
    AutoTokenizer.from_pretrained(copy).save_pretrained(copy)
    change(copy / "adapter_config.json", inference_mode=False)
    merge(copy, tmp_path / "merged")
    with pytest.raises(SettingError, match="no option"):
        export(copy, "vllm", tmp_path / "exported", foce=True)
