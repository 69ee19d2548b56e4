"""A streamed merge is the adapter on its base: every kind of adapter, every family, read back from what was written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_sft.errors import ModelError, OutputError
from lora_sft.merging.adapter import WEIGHTS, read_edits
from lora_sft.merging.base_files import weight_tensors
from lora_sft.merging.merge import merge
from lora_sft.merging.merged import open_merged
from lora_sft.merging.plain_adapter import plain_edits
from lora_sft.merging.write import write_model
from lora_sft.model.base import BaseSpec, read_config, skeleton
from tests.merging.shapes import ADDED, FAMILIES, SHAPES, load_live, save_adapter, save_base

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")

PEFT_IS_WRONG = ["tied embeddings", "tied head", "tied together", "gemma3 embeddings"]
"""Where PEFT 0.21's own merge is not its adapter."""

IDS = torch.tensor([[5, 3, 90, 17, 2, 44, 61, 8]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_base(family, folder / family) for family in FAMILIES}


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", SHAPES)
def test_a_merge_is_the_adapter_on_its_base(name, bases, tmp_path):
    family, settings = SHAPES[name]
    base, vocabulary = bases[family], ADDED.get(name, 0)
    adapter = save_adapter(base, tmp_path / "adapter", settings, vocabulary=vocabulary)
    ids = torch.tensor([[5, 96, 90, 97, 2]]) if vocabulary else IDS
    live = load_live(base, adapter, vocabulary)
    expected = logits_of(live, ids)
    with live.disable_adapter():
        assert (logits_of(live, ids) - expected).abs().max() > 0.05, "the adapter must do something"
    (tmp_path / "merged").mkdir()
    write_model(open_merged(adapter, BaseSpec(str(base))), tmp_path / "merged", "float32")
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert [*report["missing_keys"], *report["unexpected_keys"]] == []
    torch.testing.assert_close(logits_of(merged, ids), expected, rtol=0, atol=1e-5)
    by_peft = live.merge_and_unload(safe_merge=True)
    if name in PEFT_IS_WRONG:
        assert (logits_of(by_peft, ids) - expected).abs().max() > 1e-2
        return
    torch.testing.assert_close(logits_of(by_peft, ids), expected, rtol=0, atol=1e-5)
    theirs = by_peft.state_dict()
    for parameter, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, theirs[parameter], rtol=0, atol=1e-6)


PLAIN = ["plain", "rslora", "one layer", "qwen2", "qwen3", "gemma3"]


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_read_without_peft_is_what_peft_says(name, bases, tmp_path):
    family, settings = SHAPES[name]
    base = bases[family]
    adapter = save_adapter(base, tmp_path / "adapter", settings, vocabulary=ADDED.get(name, 0))
    found = plain_edits(adapter, WEIGHTS, weight_tensors(base))
    assert (found is not None) == (name in PLAIN)
    if found is None:
        return
    spec = BaseSpec(str(base))
    asked = read_edits(adapter, skeleton(read_config(spec), spec)).edits
    assert found.keys() == asked.keys()
    for parameter, (edit,) in found.items():
        (same,) = asked[parameter]
        assert edit.keys == same.keys
        assert edit.scale == same.scale
        assert all(torch.equal(one, other) for one, other in zip(edit.factors(0), same.factors(0), strict=True))


def test_a_base_in_several_shards_keeps_them(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_base("llama", tmp_path / "whole"))
    model.save_pretrained(tmp_path / "base", max_shard_size="100kB")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", SHAPES["plain"][1])
    expected = logits_of(load_live(tmp_path / "base", adapter))
    merge(adapter, tmp_path / "merged", verify="no")

    def index(folder):
        return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    assert index(tmp_path / "merged") == index(tmp_path / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_is_rounded_once(dtype, tmp_path):
    wanted = getattr(torch, dtype)
    base = save_base("llama", tmp_path / "base", wanted)
    adapter = save_adapter(base, tmp_path / "adapter", SHAPES["plain"][1])
    merge(adapter, tmp_path / "merged", verify="tensors")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    tensors, weight = load_file(adapter / WEIGHTS), load_file(base / "model.safetensors")[f"{name}.weight"]
    a, b = (tensors[f"base_model.model.{name}.lora_{one}.weight"].double() for one in "AB")
    exact = (weight.double() + 4 * (b @ a)).to(wanted)
    assert (written[f"{name}.weight"] == exact).float().mean() > 0.999  # float32 sums differ at a tie or two
    untouched = "model.layers.1.input_layernorm.weight"
    assert torch.equal(written[untouched], load_file(base / "model.safetensors")[untouched])


def broken(adapter, change):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
CANNOT = {
    "a tensor without a place": (
        lambda tensors: tensors.update({"base_model.model.model.layers.7.q_proj.lora_A.weight": torch.ones(4, 64)}),
        "layers.7.q_proj.lora_A.weight has no place in this base",
    ),
    "half a pair": (lambda tensors: tensors.pop(f"{Q}.lora_B.weight"), "q_proj.lora_B.weight, which its settings"),
    "another size": (
        lambda tensors: tensors.update({f"{Q}.lora_B.weight": torch.ones(65, 4)}),
        r"q_proj.weight: the adapter has \(65, 64\), the base \(64, 64\)",
    ),
}


@pytest.mark.parametrize("mistake", CANNOT)
def test_every_tensor_of_the_adapter_must_have_its_place(mistake, bases, tmp_path):
    change, words = CANNOT[mistake]
    adapter = save_adapter(bases["llama"], tmp_path / "adapter", {"target_modules": ["q_proj"]})
    broken(adapter, change)
    with pytest.raises(ModelError, match=words):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa: it was not saved as a plain LoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens: it acts on a part of the text only"),
        ({"peft_type": "IA3"}, "an adapter of the kind IA3"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(settings, words, bases, tmp_path):
    adapter = save_adapter(bases["llama"], tmp_path / "adapter", {"target_modules": ["q_proj"]})
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ModelError, match=words):
        merge(adapter, tmp_path / "merged")


def test_an_adapter_of_an_older_transformers_is_understood(bases, tmp_path):
    """Before version 5, each expert was a module of its own, with a LoRA of its own."""
    base = bases["mixtral"]
    adapter = save_adapter(base, tmp_path / "adapter", {"target_modules": ["q_proj"]})
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["w1", "w2", "w3"]}))
    torch.manual_seed(3)
    sizes = {"w1": (64, 128), "w2": (128, 64), "w3": (64, 128)}
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, (inputs, outputs) in sizes.items():
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(4, inputs)
                tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(outputs, 4)
    save_file(tensors, adapter / WEIGHTS)
    expected = logits_of(load_live(base, adapter))
    (tmp_path / "merged").mkdir()
    write_model(open_merged(adapter, BaseSpec(str(base))), tmp_path / "merged", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-5)


@pytest.fixture
def large(tmp_path):
    """A base and an adapter that take a moment."""
    base = save_base("llama", tmp_path / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    return base, save_adapter(base, tmp_path / "adapter", SHAPES["plain"][1])


MERGE = "import sys; from lora_sft import merge; merge(sys.argv[1], sys.argv[2], verify='tensors')"


@pytest.mark.slow
def test_a_merge_that_is_killed_leaves_nothing_under_the_final_name(large, tmp_path):
    base, adapter = large
    before = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(base.iterdir())]
    words = [sys.executable, "-W", "ignore", "-c", MERGE, str(adapter), str(tmp_path / "merged")]
    part = tmp_path / ".merged.part" / "model.safetensors"
    running = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (part.exists() and part.stat().st_size > 2**20):
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    assert [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(base.iterdir())] == before
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)  # the next one clears up and succeeds
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base", "merged"}


def test_a_full_disk_is_noticed_before_anything_is_written(large, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.statvfs(path) and type("Free", (), {"free": 2**20})())
    with pytest.raises(OutputError, match=r"0.12 GiB are needed, 0.00 GiB are free"):
        merge(large[1], tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk needs root on Linux")
@pytest.mark.parametrize("room_mib", [1, 20, 90])
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_behind(large, tmp_path, monkeypatch, room_mib):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room_mib}m", "tmpfs", str(small)])
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    try:
        monkeypatch.setattr("lora_sft.merging.merge.check_room", lambda *_: None)
        with pytest.raises(
            OutputError,
            match=r"merged: the disk is full: at least 126,[\d,]+ bytes are needed, [\d,]+ are free; make room",
        ):
            merge(large[1], small / "merged", verify="no")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
