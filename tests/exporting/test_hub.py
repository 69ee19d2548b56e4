"""The hub gets one commit, private unless said otherwise, and nothing that is only ours; played by a little hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file

from lora_sft import finetune
from lora_sft.errors import UsageError
from lora_sft.exporting.hub import HUB, OPTIONS, read_push
from lora_sft.exporting.target import Facts
from lora_sft.model.loading import trained_base
from lora_sft.publishing.public import (
    ADAPTER_FILES,
    copy_public,
    is_hub_name,
    is_path,
    public_name,
    refuse_leaks,
    without_paths,
)
from lora_sft.settings import read_file, resolve
from tests.conftest import FEW, HARBOUR
from tests.exporting.little_hub import TOKEN, LittleHub

EXPORT = """
import dataclasses, json, sys
from pathlib import Path
from lora_sft.errors import LoraSftError
from lora_sft.exporting import hub
from lora_sft.exporting.target import Order
from lora_sft.model.base import BaseSpec

given = json.loads(sys.argv[1])
hub.DOWNLOADED_BYTES = given.pop("downloaded_bytes", hub.DOWNLOADED_BYTES)
spec = BaseSpec(given.pop("base"))
paths = {name: Path(given.pop(name)) for name in ("adapter", "folder", "output")}
try:
    print(json.dumps(hub.HUB.write(Order(**paths, spec=spec, **given))))
except LoraSftError as error:
    print(json.dumps({"error": type(error).__name__, "words": str(error), "exit": error.exit_code}))
"""


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    settings = FEW | {"eval_size": 3, "save_strategy": "steps", "save_steps": 2, "lora_r": 4}
    return finetune(base, HARBOUR, output_dir=tmp_path_factory.mktemp("mine") / "harbour", **settings)


def export_to(hub: LittleHub, adapter: Path, place: Path, more: dict, options: dict, token: str | None = TOKEN) -> dict:
    """Exports in a process of its own, since huggingface_hub reads the hub's address at import.

    What is sent is laid out in `place/.sent.part`.
    """
    folder = place / ".sent.part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    order = {"adapter": str(adapter), "folder": str(folder), "output": str(place / "sent"), **more}
    order |= {"options": {"repo_id": "someone/harbour", "base_model": "org/tiny", **options}}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    kept |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(place / "hf")}
    kept |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({"HF_TOKEN": token} if token else {})
    command = [sys.executable, "-c", EXPORT, json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, env=kept, cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def adapter(run, tmp_path) -> Path:
    """A copy of the adapter that a test may spoil."""
    return Path(shutil.copytree(run.output_dir, tmp_path / "harbour"))


@pytest.fixture
def hub():
    with LittleHub() as hub:
        yield hub
        hub.shutdown()


@pytest.fixture
def export(hub, adapter, base, tmp_path):
    """Exports the adapter with the given options."""

    def export(token: str | None = TOKEN, more: dict | None = None, **options) -> dict:
        return export_to(hub, adapter, tmp_path, {"base": str(base), **(more or {})}, options, token)

    return export


@dataclass(frozen=True)
class Pushed:
    """An adapter that was sent once, for the tests that only look."""

    hub: LittleHub
    result: dict
    place: Path

    @property
    def files(self) -> dict[str, bytes]:
        return files_of(self.hub)


@pytest.fixture(scope="module")
def pushed(run, base, tmp_path_factory) -> Pushed:
    place = tmp_path_factory.mktemp("pushed")
    with LittleHub() as hub:
        result = export_to(hub, run.output_dir, place, {"base": str(base)}, {})
        hub.shutdown()
    return Pushed(hub, result, place)


def files_of(hub: LittleHub, repo_id: str = "someone/harbour") -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[repo_id].files().items() if name != ".gitattributes"}


def test_an_adapter_is_one_private_commit_that_comes_back_as_it_was_sent(pushed, run):
    result, hub = pushed.result, pushed.hub
    assert result["private"] is True
    assert hub.repos["someone/harbour"].private is True
    assert hub.repos["someone/harbour"].messages == ["initial commit", "Upload an adapter with lora_sft"]
    assert result["commit"] == hub.repos["someone/harbour"].branches["main"]
    assert result["url"] == f"{hub.address}/someone/harbour"
    sent = {file.name: file.read_bytes() for file in (pushed.place / ".sent.part").iterdir()}
    assert pushed.files == sent
    assert result["verified"] == {
        "files": len(sent),
        "bytes": sum(map(len, sent.values())),
        "downloaded": len(sent),
        "equal": True,
    }
    assert sent["adapter_model.safetensors"] == (run.output_dir / "adapter_model.safetensors").read_bytes()


def test_checkpoints_pages_and_the_trainers_state_stay_here(pushed):
    assert set(pushed.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "manifest.json",
        "metrics.jsonl",
        "run.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_nothing_that_is_sent_names_a_path_or_the_token(pushed, base, run):
    sent = b"\n".join([*pushed.hub.received, *pushed.files.values()])
    for secret in (
        TOKEN,
        str(base),
        str(run.output_dir),
        str(HARBOUR),
        str(HARBOUR.parent),
        str(pushed.place),
    ):
        assert secret.encode() not in sent
    config, manifest = (json.loads(pushed.files[name]) for name in ("adapter_config.json", "manifest.json"))
    settings = yaml.safe_load(pushed.files["run.yaml"])
    assert config["base_model_name_or_path"] == manifest["base"]["name"] == settings["model_name_or_path"] == "org/tiny"
    assert (settings["dataset"], settings["output_dir"], manifest["result"]["output_dir"]) == (
        "harbour.jsonl",
        "harbour",
        "harbour",
    )


def test_what_is_no_path_is_sent_unchanged(pushed, run):
    for name, changed in {
        "adapter_config.json": {"base_model_name_or_path"},
        "generation_config.json": set(),
        "tokenizer_config.json": set(),
    }.items():
        before, after = json.loads((run.output_dir / name).read_text()), json.loads(pushed.files[name])
        assert {key for key in before | after if before.get(key) != after.get(key)} == changed
    assert pushed.files["tokenizer.json"] == (run.output_dir / "tokenizer.json").read_bytes()


def test_what_was_sent_loads_as_the_adapter_here_does(pushed, run):
    here, there = trained_base(run.output_dir), trained_base(pushed.place / ".sent.part")
    assert there == replace(here, name="org/tiny")
    settings = resolve(read_file(pushed.place / ".sent.part" / "run.yaml"))
    assert (settings.lora_r, settings.learning_rate) == (4, FEW["learning_rate"])


def test_the_card_is_one_that_the_hub_reads(pushed):
    card = ModelCard(pushed.files["README.md"].decode())
    assert (card.data.base_model, card.data["base_model_relation"]) == ("org/tiny", "adapter")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert 'from_pretrained("someone/harbour"' in card.text


def test_the_licence_is_that_of_the_base_where_the_hub_knows_it(export, hub):
    hub.add("org/tiny", private=False).card_data = {"license": "apache-2.0", "tags": ["x"]}
    export()
    assert ModelCard(files_of(hub)["README.md"].decode()).data.license == "apache-2.0"
    export(license="mit")
    assert ModelCard(files_of(hub)["README.md"].decode()).data.license == "mit"


def test_a_card_of_ones_own_is_sent_as_it_is(export, hub, tmp_path):
    (tmp_path / "mine.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    export(card=str(tmp_path / "mine.md"))
    assert files_of(hub)["README.md"] == b"---\nlicense: mit\n---\n\n# Mine\n"


def test_sent_again_it_replaces_what_was_sent_and_leaves_the_rest(export, hub, adapter):
    hub.add("someone/harbour", True, {"model-00001-of-00002.safetensors": b"old", "picture.png": b"mine"})
    export()
    assert "model-00001-of-00002.safetensors" not in files_of(hub)
    assert files_of(hub)["picture.png"] == b"mine"
    first = export()
    assert len(hub.pushes()) == 1  # nothing had changed
    assert first["commit"] == hub.repos["someone/harbour"].branches["main"]


def test_a_branch_is_made_and_a_message_is_taken(export, hub):
    result = export(revision="trial", message="Try it")
    repo = hub.repos["someone/harbour"]
    assert repo.branches["trial"] == result["commit"] != repo.branches["main"]
    assert repo.messages[-1] == "Try it"


def test_a_name_without_an_owner_is_that_of_the_user(export, hub):
    assert export(repo_id="harbour", private="false")["repo_id"] == "someone/harbour"
    assert hub.repos["someone/harbour"].private is False


def test_large_files_are_compared_by_the_hash_that_the_hub_holds(export, hub):
    result = export(more={"downloaded_bytes": 30_000})
    assert result["verified"]["downloaded"] == result["verified"]["files"] - 1
    hub.spoils = "adapter_model.safetensors"
    assert export(repo_id="other", more={"downloaded_bytes": 30_000})["error"] == "VerificationError"


def test_a_merged_model_is_sent_with_a_card_of_its_own(export, hub, base, adapter, tmp_path):
    merged = shutil.copytree(base, tmp_path / "merged")
    weights = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    verified = {"mean_kl": 1e-6, "top1_agreement": 1.0}
    record = {
        "base": {"name": str(base), "revision": None},
        "dtype": "float32",
        "verified": verified,
        "adapters": [{"name": "a", "sha256": weights}],
    }
    (merged / "merge.json").write_text(json.dumps(record))
    (merged / "notes.txt").write_text("mine")
    result = export(merged=str(merged))
    assert result["serve"] == "vllm serve someone/harbour"
    sent = files_of(hub)
    assert not {"adapter_config.json", "notes.txt"} & set(sent)
    assert sent["model.safetensors"] == (base / "model.safetensors").read_bytes()
    card = ModelCard(sent["README.md"].decode())
    assert (card.data["base_model_relation"], card.data.library_name) == ("finetune", "transformers")
    assert "mean KL 1.0e-06" in card.text
    assert json.loads(sent["merge.json"]) == record | {"base": {"name": "org/tiny", "revision": None}}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"adapters": [{"name": "a", "sha256": "0" * 64}]}, "made from another adapter"),
        ({"verified": {"holds": False}}, "is not the adapter, as its own verification found"),
    ],
)
def test_a_merged_model_that_is_not_this_adapter_is_refused(export, hub, base, tmp_path, record, words):
    merged = shutil.copytree(base, tmp_path / "merged")
    (merged / "merge.json").write_text(json.dumps(record))
    assert words in export(merged=str(merged))["words"]
    assert hub.asked == []


# --- refused before anything is sent -------------------------------------------------------------------


def refused(hub: LittleHub, found: dict) -> str:
    assert (found["error"], found["exit"]) == ("UsageError", 2)
    assert not hub.pushes()
    assert not hub.blobs
    return found["words"]


def test_a_public_repository_is_not_written_to_unless_that_is_said(export, hub):
    hub.add("someone/harbour", private=False)
    assert "exists and is public" in refused(hub, export())
    assert export(private=False)["private"] is False


def test_a_repository_that_is_to_be_public_and_is_private_is_refused(export, hub):
    hub.add("someone/harbour", private=True)
    assert "exists and is private" in refused(hub, export(private=False))


def test_a_hub_that_makes_it_public_against_our_wish_gets_nothing(export, hub):
    hub.makes_all_public = True
    assert "did not make it private" in refused(hub, export())


def test_a_token_that_may_only_read_is_refused(export, hub):
    hub.role = "read"
    assert "may only read" in refused(hub, export())


def test_a_wrong_token_is_refused(export, hub):
    words = refused(hub, export(token="hf_" + "x" * 34))
    assert "nothing was sent" in words
    assert "\n" not in words
    assert "x" * 34 not in words


def test_no_token_is_refused(export, hub):
    assert "nothing was sent" in refused(hub, export(token=None))
    assert hub.asked == []


def test_a_name_that_is_not_ours_is_refused(export, hub):
    hub.may_write = False
    assert "403" in refused(hub, export(repo_id="others/harbour"))


@pytest.mark.parametrize(
    ("file", "words", "found"),
    [
        ("chat_template.jinja", "{# {here}/harbour #}", "a path of this machine"),
        ("metrics.jsonl", '{"step": 1, "note": "/home/anna/data.jsonl"}', "a path of a machine (/home/anna/"),
        ("chat_template.jinja", "hf_" + "q" * 34, "an access token"),
        ("metrics.jsonl", '{"step": 1, "at": "https://anna:pass@example.org"}', "a name with its password"),
        ("tokenizer_config.json", '{"x": "' + TOKEN + '"}', "the access token of this machine"),
    ],
)
def test_a_file_that_names_a_path_or_a_secret_stops_it(export, hub, adapter, tmp_path, file, words, found):
    (adapter / file).write_text(words.replace("{here}", str(tmp_path)))
    told = refused(hub, export())
    assert f"{file}: holds {found}" in told


# --- failed on the way ---------------------------------------------------------------------------------


def test_a_commit_that_is_not_taken_leaves_nothing(export, hub):
    hub.takes_commits = False
    found = export()
    assert (found["error"], found["exit"]) == ("RunError", 1)
    assert "You are out of storage" in found["words"]
    assert list(hub.repos["someone/harbour"].commits) == [hub.repos["someone/harbour"].branches["main"]]


def test_a_file_that_comes_back_changed_is_named(export, hub):
    hub.spoils = "chat_template.jinja"
    found = export()
    assert (found["error"], found["exit"]) == ("VerificationError", 3)
    assert "chat_template.jinja differ" in found["words"]


def test_a_hub_that_is_not_there_is_an_error_of_one_line(export, hub, monkeypatch):
    monkeypatch.setattr(LittleHub, "address", "http://127.0.0.1:9")
    words = refused(hub, export())
    assert words.startswith("the hub (http://127.0.0.1:9): ")
    assert "\n" not in words


# --- known without the hub -----------------------------------------------------------------------------


def facts(tokenizer, base: str) -> Facts:
    return Facts({"base_model_name_or_path": base}, None, tokenizer)


def test_what_is_wrong_with_the_options_is_said_at_once(tokenizer, tmp_path):
    options = {"private": "perhaps", "base_model": str(tmp_path), "merged": str(tmp_path), "card": "no.md", "nme": "x"}
    (words,) = HUB.refusals(facts(tokenizer, "org/tiny"), options)
    for part in (
        "repo_id is missing",
        "private: 'perhaps'",
        "base_model:",
        "holds no merged model",
        "card: no.md",
        "nme",
    ):
        assert part in words
    assert set(HUB.options) == set(OPTIONS) == set(read_push({"repo_id": "x"}).__dataclass_fields__)


@pytest.mark.parametrize("name", ["a/b/c", "-a", "a b", "../a", "/tmp/a", "a--b"])
def test_a_name_that_the_hub_would_not_take_is_refused(tokenizer, name):
    assert "is no name of the hub" in HUB.refusals(facts(tokenizer, "org/tiny"), {"repo_id": name})[0]


def test_a_base_that_nobody_else_has_needs_a_name(tokenizer, base, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    here = facts(tokenizer, str(base))
    assert "trained on a folder" in HUB.refusals(here, {"repo_id": "a/b"})[0]
    assert HUB.refusals(here, {"repo_id": "a/b", "base_model": "org/tiny"}) == []
    assert HUB.refusals(facts(tokenizer, "org/tiny"), {"repo_id": "a/b", "private": "no"}) == []


def test_no_token_and_no_network_are_known_beforehand(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in HUB.refusals(facts(tokenizer, "org/tiny"), {"repo_id": "a/b"})[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "no access token" in HUB.refusals(facts(tokenizer, "org/tiny"), {"repo_id": "a/b"})[0]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("/home/anna/models/tiny", "tiny"),
        ("/data/tiny/", "tiny"),
        ("~/tiny", "tiny"),
        ("../tiny", "tiny"),
        (r"C:\Users\anna\tiny", "tiny"),
        ("file:///home/anna/tiny", "tiny"),
        ("org/tiny", "org/tiny"),
        ("s3://bucket/tiny", "s3://bucket/tiny"),
        ("</s>", "</s>"),
        ("/", "/"),
        ("nf4", "nf4"),
    ],
)
def test_a_path_is_shown_by_its_last_part(written, shown):
    assert public_name(written) == shown
    assert is_path(written) is (written != shown)


def test_paths_and_secrets_leave_settings_wherever_they_stand():
    given = {
        "dataset": [{"path": "/home/anna/a.jsonl", "weight": 1.0}, "org/data"],
        "training_args": {"logging_dir": "/var/log/x", "hub_token": "hf_x", "api_key": "k", "adam_beta2": 0.9},
        "new_tokens": ["/think", "/a/b"],
        "stop_tokens": ["</s>"],
        "supervised_tokens": 3,
        "bf16": True,
    }
    assert without_paths(given) == {
        "dataset": [{"path": "a.jsonl", "weight": 1.0}, "org/data"],
        "training_args": {"logging_dir": "x", "adam_beta2": 0.9},
        "new_tokens": ["/think", "/a/b"],
        "stop_tokens": ["</s>"],
        "supervised_tokens": 3,
        "bf16": True,
    }


def test_a_folder_is_no_hub_name(tmp_path):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert not is_hub_name("org/tiny")  # the working folder of a test is tmp_path
    assert is_hub_name("org/small")


def test_the_adapter_is_left_as_it_was(adapter, tmp_path):
    before = {file: file.read_bytes() for file in adapter.rglob("*") if file.is_file()}
    (tmp_path / "out").mkdir()
    copy_public(adapter, tmp_path / "out", "org/tiny", ADAPTER_FILES)
    (tmp_path / "out" / "chat_template.jinja").write_text("changed")
    assert {file: file.read_bytes() for file in before} == before


def test_what_is_written_at_the_head_of_weights_is_looked_at(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"ss_train_dir": "/home/anna/pictures/x"})
    with pytest.raises(UsageError, match=r"model\.safetensors: holds a path of a machine"):
        refuse_leaks(tmp_path, [], None)
