"""Each known bad combination is told where it applies, with what to do, and nowhere else."""

import importlib.metadata
import json
from dataclasses import replace

import pytest

from lora_sft.cli import doctor, main
from lora_sft.cli.known_bad import KNOWN_BAD, Gpu, Machine, troubles

SOUND = Machine(
    python="3.12.4",
    versions={
        "torch": "2.13.0+cu130",
        "torchvision": "0.28.0",
        "transformers": "5.23.0",
        "tokenizers": "0.23.1",
        "peft": "0.21.2",
        "trl": "1.16.0",
        "bitsandbytes": "0.50.2",
    },
    requires={
        "torchvision": ["numpy", "torch==2.13.0"],
        "transformers": ["tokenizers<=0.24,>=0.22", "trl<1; extra == 'x'"],
    },
    torch_cuda="13.0",
    torch_archs=["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"],
    gpus=[Gpu("NVIDIA H100", (9, 0))],
    driver="580.65.06",
    environment={},
    shared_bytes=2**34,
)
T4, L4 = Gpu("Tesla T4", (7, 5)), Gpu("NVIDIA L4", (8, 9))


def with_versions(**versions) -> dict:
    return {"versions": {**SOUND.versions, **{name.replace("_", "-"): one for name, one in versions.items()}}}


CASES = {
    "requirements": (
        with_versions(tokenizers="0.25.0"),
        "transformers 5.23.0 needs tokenizers<=0.24,>=0.22, and 0.25.0 is",
    ),
    "torchvision": (
        with_versions(torch="2.12.1+cu130"),
        "torchvision 0.28.0 is built for torch==2.13.0, and 2.12.1+cu130 is",
    ),
    "torchao": (with_versions(torchao="0.15.0"), "torchao 0.15.0 beside PEFT 0.21.2"),
    "gptqmodel": (with_versions(gptqmodel="7.1.0"), "gptqmodel 7.1.0 and no optimum beside PEFT 0.21.2"),
    "bitsandbytes": ({"bitsandbytes_error": "no library for CUDA 14.0"}, "no library for CUDA 14.0: 4-bit and 8-bit"),
    "flash-attn": ({"flash_attn_error": "undefined symbol"}, "undefined symbol: a model with attn_implementation"),
    "PyTorch": ({"torch_cuda": None, "gpus": []}, "an NVIDIA driver beside a PyTorch without CUDA"),
    "driver": ({"driver": "570.86.15"}, "NVIDIA driver 570.86.15, and PyTorch for CUDA 13.0 needs 580"),
    "hidden GPU": (
        {"environment": {"CUDA_VISIBLE_DEVICES": ""}, "gpus": []},
        "CUDA_VISIBLE_DEVICES='' hides every GPU",
    ),
    "GPU architecture": (
        {"gpus": [Gpu("Tesla P100", (6, 0))], "torch_archs": ["sm_75", "sm_80"]},
        "Tesla P100 (sm_60)",
    ),
    "several GPUs": ({"gpus": [L4, L4]}, "2 GPUs: one process uses the first alone"),
    "bfloat16": ({"gpus": [T4]}, "Tesla T4 (sm_75): there is no bfloat16"),
    "/dev/shm": ({"shared_bytes": 64 * 2**20}, "64 MiB: processes that load data"),
    "WSL": ({"is_wsl": True}, "Linux inside Windows: little memory"),
    "Python 3.10": ({"python": "3.10.14"}, "Python 3.10: transformers 5.20"),
}


def told(machine) -> dict[str, str]:
    return {known.topic: f"{found}: {known.wrong}; {known.do}" for known, found in troubles(machine)}


def test_of_a_sound_machine_nothing_is_told():
    assert told(SOUND) == {}
    assert told(Machine(environment={})) == {}


def test_every_entry_has_a_case_and_says_where_it_is_known_from():
    assert [known.topic for known in KNOWN_BAD] == list(CASES)
    assert all(known.wrong and known.do and known.source for known in KNOWN_BAD)


@pytest.mark.parametrize("topic", CASES)
def test_it_is_told_where_it_applies(topic):
    change, words = CASES[topic]
    found = told(replace(SOUND, **change))
    assert words in found[topic]
    assert set(found) <= {topic, "bfloat16"}  # a GPU that is too old for this PyTorch has no bfloat16 either


@pytest.mark.parametrize(
    "change",
    [
        with_versions(torchao="0.16.0"),
        with_versions(gptqmodel="7.0.0", optimum="1.24.0"),
        with_versions(torch="2.13.0"),
        {"gpus": [L4], "environment": {"CUDA_VISIBLE_DEVICES": "0"}},
        {"gpus": [L4, L4], "environment": {"LOCAL_RANK": "1"}},
        {"gpus": [Gpu("of tomorrow", (13, 0))]},  # compiled further from compute_120
        {"torch_cuda": "12.8", "driver": "525.60.13"},
        {"driver": "of an unknown version"},
        {"is_wsl": True, "gpus": []},
        {"python": "3.11.0"},
        {"shared_bytes": None},
    ],
    ids=str,
)
def test_it_is_not_told_where_it_does_not_apply(change):
    assert told(replace(SOUND, **change)) == {}


def test_peft_refuses_what_the_table_says_it_refuses(monkeypatch):
    """The versions are those in its source; when they change, so must the table."""
    import importlib.util

    import peft.import_utils as peft

    there, version = importlib.util.find_spec, importlib.metadata.version
    versions = {"torchao": "0.15.9", "gptqmodel": "6.9.0"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name in versions or there(name, *rest))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or version(name))
    for ask in (peft.is_torchao_available, peft.is_gptqmodel_available):
        ask.cache_clear()
        try:
            with pytest.raises(ImportError, match="incompatible version"):
                ask()
        finally:
            ask.cache_clear()


def run(capsys, *words) -> dict[str, dict]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json", *words])
    assert not ended.value.code
    return {check["topic"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


def test_the_doctor_tells_them_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "look", lambda: replace(SOUND, **CASES["torchvision"][0], gpus=[T4]))
    checks = run(capsys)
    assert checks["torchvision"]["status"] == "bad"
    assert "training needs neither vision nor audio" in checks["torchvision"]["words"]
    assert checks["bfloat16"]["status"] == "missing"
    assert "driver" not in checks


def test_the_doctor_tells_of_kernels(monkeypatch, capsys):
    kernels = {topic: check for topic, check in run(capsys).items() if topic.startswith("kernel ")}
    assert set(kernels) == {
        f"kernel {name}"
        for name in ("liger-kernel", "flash-attn", "triton", "causal-conv1d", "varlen_attn", "bitsandbytes")
    }
    assert kernels["kernel bitsandbytes"]["words"].startswith("libbitsandbytes_")
    machine = replace(SOUND, versions=SOUND.versions | {"triton": "3.7.0", "liger-kernel": "0.9.1"})
    monkeypatch.setattr(doctor, "look", lambda: machine)
    kernels = run(capsys)
    assert kernels["kernel triton"] == {"topic": "kernel triton", "status": "ok", "words": "3.7.0"}
    assert kernels["kernel liger-kernel"]["status"] == kernels["kernel varlen_attn"]["status"] == "ok"
    assert "not packed" in kernels["kernel causal-conv1d"]["words"]


def test_a_library_that_cannot_be_loaded_is_told_with_its_error(monkeypatch):
    from bitsandbytes import cextension

    monkeypatch.setattr(
        cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("No compatible CUDA binary found")
    )
    assert doctor._error_of_bitsandbytes() == "No compatible CUDA binary found"
    assert doctor._library_of_bitsandbytes().startswith("no native library")
    assert doctor._error_of_import("json") == ""
    assert "not to be imported (No module named 'flash_attn_of_another_torch')" in doctor._error_of_import(
        "flash_attn_of_another_torch"
    )


def test_this_machine_is_looked_at():
    found = doctor.look()
    assert found.versions["transformers"] == importlib.metadata.version("transformers")
    assert any(line.startswith("tokenizers") for line in found.requires["transformers"])
