"""R24: an `adapter_config.json`, a manifest or a YAML file of a stranger: refused with the reason, and nothing runs."""

import json
import shutil
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from lora_sft import export, finetune, load, merge
from lora_sft.errors import ModelError, SettingError
from lora_sft.settings import read_file, resolve
from tests.conftest import FEW, HARBOUR
from tests.security.apart import apart


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return finetune(base, HARBOUR, output_dir=tmp_path_factory.mktemp("runs") / "run", **FEW)


@pytest.fixture
def adapter(run, tmp_path):
    """A copy of the run's folder as somebody else's: without the record of the run."""
    folder = shutil.copytree(run.output_dir, tmp_path / "adapter")
    (folder / "manifest.json").unlink()
    return folder


SLOW = "(_*[a-z]*)*_*_*[a-z]*!"
HOSTILE = [
    ({"auto_mapping": {"base_model_class": "X", "parent_library": "planted"}}, "has PEFT import 'planted'"),
    ({"auto_mapping": {"parent_library": "transformers_planted"}}, "auto_mapping"),
    ({"auto_mapping": {"parent_library": "os"}}, "auto_mapping"),
    ({"auto_mapping": "planted"}, "auto_mapping"),
    ({"base_model_name_or_path": "https://example.com/model"}, "a base is a folder or a hub name"),
    ({"base_model_name_or_path": "file:///etc"}, "a base is a folder or a hub name"),
    ({"base_model_name_or_path": "s3://bucket/model"}, "a base is a folder or a hub name"),
    ({"base_model_name_or_path": 7}, "a base is a folder or a hub name"),
    ({"base_model_name_or_path": "a\0b"}, "a base is a folder or a hub name"),
    ({"base_model_name_or_path": "../../../../etc"}, "etc"),
    ({"base_model_name_or_path": "/nowhere/at/all"}, "model /nowhere/at/all"),
    ({"base_model_name_or_path": "somebody/else"}, "cannot be had"),
    ({"base_model_name_or_path": None}, "does not name the base model"),
    ({"target_modules": SLOW}, "takes more than 5 s"),
    ({"target_modules": "(a+)+" * 999}, "a pattern of 4,995 characters"),
    ({"target_modules": "(" * 5000}, "characters"),
    ({"target_modules": "(q_proj"}, "is no regex"),
    ({"exclude_modules": SLOW}, "takes more than 5 s"),
    ({"layers_to_transform": [0], "layers_pattern": SLOW}, "takes more than 5 s"),
    ({"layers_to_transform": [0], "layers_pattern": [SLOW]}, "takes more than 5 s"),
    ({"rank_pattern": {SLOW: 8}}, "takes more than 5 s"),
    ({"alpha_pattern": {SLOW: 8}}, "takes more than 5 s"),
    ({"modules_to_save": [SLOW]}, "takes more than 5 s"),
    ({"r": 10**9}, "a rank is a whole number up to"),
    ({"r": 0}, "a rank is a whole number"),
    ({"r": "8"}, "a rank is a whole number"),
    ({"r": True}, "a rank is a whole number"),
    ({"rank_pattern": {"q_proj": 10**9}}, "a rank is a whole number"),
    ({"rank_pattern": [1]}, "a rank is a whole number"),
    ({"lora_alpha": float("nan")}, "alpha is a number above 0"),
    ({"lora_alpha": float("inf")}, "alpha is a number above 0"),
    ({"lora_alpha": "1"}, "alpha is a number above 0"),
    ({"alpha_pattern": {"q_proj": -1}}, "alpha is a number above 0"),
    ({"peft_type": None}, "LoRA and its variants"),
    ({"peft_type": "../../planted"}, "LoRA and its variants"),
    ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9}, "LoRA and its variants"),
    ({"task_type": "planted"}, "task_type"),
    ({"layer_replication": [[0, 10**9]]}, "layer_replication names a layer"),
    ({"megatron_config": {"a": 1}, "megatron_core": "planted"}, "megatron_config has PEFT import"),
    ({"trainable_token_indices": {"embed_tokens": [10**9]}}, "trainable_token_indices names a token"),
]  # fmt: skip


@pytest.mark.parametrize(("planted", "words"), HOSTILE)
def test_a_hostile_adapter_config_is_refused_with_the_reason(planted, words, adapter, tmp_path, monkeypatch):
    for name in ("planted", "transformers_planted"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | planted))
    for work in (
        lambda: load(adapter),
        lambda: merge(adapter, tmp_path / "merged"),
        lambda: export(adapter, "vllm", tmp_path / "exported"),
    ):
        outcome = apart(work, limit_seconds=40)
        assert outcome.error is not None
        assert outcome.error[0] in ("ModelError", "UsageError", "SettingError"), outcome.error
        assert words in outcome.error[1]
        assert outcome.grown_bytes < 2**30
        assert (
            set(outcome.ran) <= {"subprocess.Popen", "os.posix_spawn", "os.fork"} if "5 s" in words else not outcome.ran
        )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"r": ' + "[" * 100_000, "\ufffe", '{"r": ' + "9" * 5000 + "}"])
def test_a_broken_adapter_config_is_refused(text, adapter, tmp_path):
    (adapter / "adapter_config.json").write_text(text)
    for work in (lambda: load(adapter), lambda: merge(adapter, tmp_path / "merged")):
        with pytest.raises(ModelError, match=r"adapter_config.json: "):
            work()


def test_settings_of_another_peft_are_no_attack(adapter, tmp_path):
    """`auto_mapping` as PEFT itself writes it, and a setting of a later version."""
    file = adapter / "adapter_config.json"
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_mapping": mapping}))
    merge(adapter, tmp_path / "merged")
    assert "planted" not in sys.modules


@pytest.mark.parametrize("name", ["somebody/else", "https://example.com/x", "gpt2"])
def test_an_adapter_that_was_trained_here_is_not_redirected(name, run, tmp_path):
    """The manifest tells the base; a name that is no folder here is not fetched instead of it."""
    folder = shutil.copytree(run.output_dir, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    for work in (lambda: load(folder), lambda: merge(folder, tmp_path / "merged", force=True)):
        with pytest.raises(ModelError, match=r"base_model_name_or_path|a base is a folder"):
            work()


@pytest.mark.parametrize(
    "recorded",
    [
        7,
        [],
        {"name": 7},
        {"name": "x", "dtype": "load"},
        {"name": "x", "dtype": "float32", "quantization": "planted", "double_quant": False},
        {"name": "x", "dtype": "float32", "quantization": None, "double_quant": "yes"},
    ],
)
def test_a_hostile_manifest_is_refused(recorded, run, tmp_path):
    folder = shutil.copytree(run.output_dir, tmp_path / "adapter")
    (folder / "manifest.json").write_text(json.dumps({"base": recorded}))
    with pytest.raises(ModelError, match=r"manifest.json: does not tell how the base was loaded"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_broken_manifest_is_refused(text, run, tmp_path):
    folder = shutil.copytree(run.output_dir, tmp_path / "adapter")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ModelError, match=r"manifest.json: "):
        load(folder)


def test_the_weights_of_an_adapter_are_read_from_safetensors_alone(adapter, tmp_path):
    import torch

    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    for work in (lambda: load(adapter), lambda: merge(adapter, tmp_path / "merged")):
        with pytest.raises(ModelError, match="other weight files are not read, since loading them can run code"):
            work()
    (adapter / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.bin").read_bytes())
    with pytest.raises(ModelError, match="is no safetensors file"):
        load(adapter)
    save_file({}, adapter / "adapter_model.safetensors")


YAML = {
    "seed: 1\nseed: 2\n": ":2:1: seed stands twice",
    'seed: 1\n"seed": 2\n': "seed stands twice",
    "learning-rate: 1e-4\nlearning_rate: 2e-4\n": "are one setting",
    "lora_config: {bias: all, bias: none}\n": "bias stands twice",
    "seed: !!python/object/apply:os.system [touch ran]\n": ":1:7: could not determine a constructor",
    "seed: !!python/object/new:os.system [touch ran]\n": "could not determine a constructor",
    "seed: !!python/name:os.system\n": "could not determine a constructor",
    "seed: !!python/module:planted\n": "could not determine a constructor",
    "!!python/object/apply:subprocess.Popen [[touch, ran]]\n": "could not determine a constructor",
    "seed: !ENV HOME\n": "could not determine a constructor",
    "seed: !include /etc/passwd\n": "could not determine a constructor",
    "seed: !!binary aGVsbG8=\n": "seed",
    "seed: !!timestamp 2020-01-01\n": "seed",
    "seed: !!int abc\n": "invalid literal",
    "seed: !!float abc\n": "could not convert",
    "seed: " + "9" * 6000 + "\n": "4300 digits",
    "? [a]\n: 1\n": "a name must be a word",
    "{a: 1}: 2\n": "a name must be a word",
    "lora_config: &a {a: *a}\n": "its aliases stand for more than",
    "lora_config: &a [*a]\n": "its aliases stand for more than",
    "a: &a0 [x, x]\n" + "".join(f"b{n}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40)): "its aliases stand for",
    "lora_config: " + "[" * 5000 + "]" * 5000: "brackets",
    "lora_config: " + "{a: " * 5000 + "}" * 5000: "brackets",
    "# " + "x" * 2**21: "settings take no more than",
    "seed: 1\n---\nseed: 2\n": "another document",
    "seed: 1\x00": "#x0000",
    "[1, 2]": "holds list",
    "seed": "holds str",
    "": "holds NoneType",
    "learning_rate: .inf\n": "is no number to compute with",
    "learning_rate: 1e400\n": "is no number to compute with",
    "learning_rate: .nan\n": "learning_rate",
    "training_args: {adam_epsilon: .inf}\n": "is no number to compute with",
    "training_args: {hub_token: x}\n": "hub_token",
    "hub_token: x\n": "hub_token",
}  # fmt: skip


@pytest.mark.parametrize("text", YAML)
def test_hostile_yaml_is_refused_with_the_reason(text, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    clock = time.process_time()
    with pytest.raises(SettingError) as refused:
        resolve(read_file(file))
    assert YAML[text] in str(refused.value)
    assert time.process_time() - clock < 5
    assert not (tmp_path / "ran").exists()


def test_settings_say_nothing_of_the_environment(tmp_path, monkeypatch):
    """What looks like a variable stays the text that it is."""
    monkeypatch.setenv("SECRET", "planted")
    for text in ("${SECRET}", "$SECRET", "{{ env.SECRET }}", "%(SECRET)s", "$(echo planted)", "`echo planted`"):
        (tmp_path / "run.yaml").write_text(f"output_dir: '{text}'\n")
        assert resolve(read_file(tmp_path / "run.yaml")).output_dir == text


def test_anchors_of_an_honest_file_are_read(tmp_path):
    (tmp_path / "run.yaml").write_text("lora_modules_to_save: &names [embed_tokens, lm_head]\nnew_tokens: *names\n")
    config = resolve(read_file(tmp_path / "run.yaml"))
    assert config.new_tokens == config.lora_modules_to_save == ["embed_tokens", "lm_head"]
