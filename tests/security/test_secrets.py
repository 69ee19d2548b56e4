"""R25, R26: what this machine keeps to itself is in no file and no word of a run; a local run asks no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HARBOUR

PLANTED = {
    "HF_TOKEN": "hf_" + "PlantedInTheEnvironment" * 2,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "PlantedByItsOldName" * 2,
    "HUGGINGFACE_TOKEN": "hf_" + "PlantedByAnotherName" * 2,
    "WANDB_API_KEY": "0planted1wandb2key3" * 2,
    "COMET_API_KEY": "0planted1comet2key3" * 2,
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
    "NEPTUNE_API_TOKEN": "planted-neptune-token",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/access/key",
    "OPENAI_API_KEY": "sk-planted-openai-key",
}
LOGIN, STORED, NETRC = "hf_" + "PlantedInTheLogin" * 2, "hf_" + "PlantedInStoredTokens" * 2, "planted-netrc-password"

WORK = """
import json, os, socket, sys
attempts = []
def watched(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        address = arguments[-1] if event != "socket.getaddrinfo" else arguments[0]
        if not (event == "socket.connect" and isinstance(address, (str, bytes))):  # a socket of the file system
            attempts.append([event, repr(arguments)])
            raise OSError("no network in this test: " + event)
sys.addaudithook(watched)
from lora_sft import evaluate, export, finetune, load, merge, preview, validate
base, data, out = sys.argv[1:4]
settings = json.loads(sys.argv[4])
validate(data, base)
next(iter(preview(base, data)))
run = finetune(base, data, output_dir=out + "/run", eval_size=4, **settings)
merge(out + "/run", out + "/merged")
export(out + "/run", "vllm", out + "/vllm")
evaluate(out + "/run", data)
load(out + "/merged").chat("Who are you?", max_new_tokens=3)
load(out + "/run").chat("Who are you?", max_new_tokens=3)
finetune(base, data, output_dir=out + "/run", eval_size=4, **settings)
json.dump(attempts, open(out + "/attempts", "w"))
"""
SETTINGS = {
    **{"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "lora_r": 4},
    **{"save_strategy": "steps", "save_steps": 1, "listeners": ()},
}


def go(base, home, **environment):
    """A whole life of an adapter, in a process of its own whose home is `home`."""
    out = home / "out"
    out.mkdir(parents=True)
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "LANG") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(base), str(HARBOUR), str(out), json.dumps(SETTINGS)],
        env={**kept, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout + done.stderr


@pytest.fixture(scope="module")
def life(base, tmp_path_factory):
    """One of a user with many secrets, who has not said that there is no network."""
    home = tmp_path_factory.mktemp("home")
    store = home / ".cache" / "huggingface"
    store.mkdir(parents=True)
    (store / "token").write_text(LOGIN)
    (store / "stored_tokens").write_text(f"[mine]\nhf_token = {STORED}\n")
    (home / ".netrc").write_text(f"machine huggingface.co login me password {NETRC}\n")
    return go(base, home, **PLANTED)


@pytest.mark.slow
@pytest.mark.parametrize("secret", [*PLANTED.values(), LOGIN, STORED, NETRC])
def test_no_secret_stands_in_any_file_or_word(secret, life):
    out, said = life
    files = [
        file
        for file in out.parent.rglob("*")
        if file.is_file() and file.name not in ("token", "stored_tokens", ".netrc")
    ]
    names = {file.name for file in files}
    assert {"adapter_model.safetensors", "README.md", "report.html", "run.yaml", "manifest.json", "merge.json"} <= names
    assert [file for file in files if secret.encode() in file.read_bytes()] == []
    assert secret not in said


@pytest.mark.slow
def test_a_local_run_asks_no_network(life):
    """Though nobody said that there is none."""
    assert json.loads((life[0] / "attempts").read_text()) == []


@pytest.mark.slow
def test_neither_does_it_when_the_hub_is_offline(base, tmp_path):
    out, _ = go(base, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert json.loads((out / "attempts").read_text()) == []


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token", "token", "hf_token", "api_key"])
def test_a_token_is_no_setting(name, base, tmp_path, capfd):
    """So it cannot come into `run.yaml`; the refusal does not repeat it."""
    from lora_sft import finetune
    from lora_sft.errors import SettingError

    for given in ({name: PLANTED["HF_TOKEN"]}, {"training_args": {name: PLANTED["HF_TOKEN"]}}):
        with pytest.raises(SettingError) as refused:
            finetune(base, HARBOUR, output_dir=tmp_path / "run", **given)
        assert PLANTED["HF_TOKEN"] not in str(refused.value)
    assert PLANTED["HF_TOKEN"] not in "".join(capfd.readouterr())
