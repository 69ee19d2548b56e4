"""A fingerprint is the same for the same files anywhere, and another for every other base."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_sft.errors import ModelError
from lora_sft.model import fingerprint
from lora_sft.model.base import BaseSpec
from lora_sft.model.fingerprint import fingerprint_of, fingerprint_of_loaded


def test_a_copy_has_the_same_fingerprint_and_another_base_of_the_same_shape_another(base, tied_base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{}")
    assert fingerprint_of(BaseSpec(str(base))) == fingerprint_of(BaseSpec(str(copy), dtype="bfloat16"))
    weights = load_file(copy / "model.safetensors")
    name = min(weights)
    weights[name] = weights[name] + 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert len({fingerprint_of(BaseSpec(str(one))) for one in (base, copy, tied_base)}) == 3


def test_of_a_large_file_samples_are_read(base, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "BLOCKS", 4)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 16)
    copy = shutil.copytree(base, tmp_path / "copy")
    before = fingerprint_of(BaseSpec(str(copy)))
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint_of(BaseSpec(str(copy))) != before


def test_shards_that_the_index_names_are_read_and_no_others(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint_of(BaseSpec(str(copy))) == fingerprint_of(BaseSpec(str(base)))
    (copy / "consolidated.safetensors").write_bytes(b"something else")
    assert fingerprint_of(BaseSpec(str(copy))) == fingerprint_of(BaseSpec(str(base)))


@pytest.mark.parametrize("broken", [b"", b"\xff" * 100])
def test_a_broken_file_is_named(base, tmp_path, broken):
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(broken)
    with pytest.raises(ModelError, match=r"model\.safetensors: is no safetensors file"):
        fingerprint_of(BaseSpec(str(copy)))


def test_what_is_not_there_has_none():
    with pytest.raises(ModelError, match=r"no config\.json"):
        fingerprint_of(BaseSpec("somebody/not-in-the-cache"))


def test_a_loaded_model_has_one_of_its_own(base, tied_base):
    first, again = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32) for _ in range(2))
    other = AutoModelForCausalLM.from_pretrained(tied_base, dtype=torch.float32)
    before = fingerprint_of_loaded(first)
    assert before == fingerprint_of_loaded(again) != fingerprint_of_loaded(other)
    with torch.no_grad():
        first.get_output_embeddings().weight += 1
    assert fingerprint_of_loaded(first) != before
