"""R21, R22, R27: nothing that lies with a model, an adapter or a checkpoint runs; no name leads out of its folder."""

import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_sft import errors, evaluate, export, finetune, load, merge, validate
from lora_sft.chat.templates import find_template
from lora_sft.errors import LoraSftError, ModelError, UsageError
from tests.conftest import FEW, HARBOUR
from tests.security.apart import apart


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    settings = FEW | {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    return finetune(base, HARBOUR, output_dir=tmp_path_factory.mktemp("runs") / "run", **settings)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def malicious(path):
    """The pickle by itself, and in the zip file that torch writes."""
    plain = pickle.dumps(Touch(path))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("archive/data.pkl", plain)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return plain, packed.getvalue()


def test_the_pickles_of_these_tests_would_run(tmp_path):
    import torch

    for number, content in enumerate(malicious(tmp_path / "ran")):
        (tmp_path / "file").write_bytes(content)
        if number:
            torch.load(tmp_path / "file", weights_only=False)
        else:
            pickle.loads(content)
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()


def everything(run_folder, base_folder, tmp_path):
    """Whatever reads a model, an adapter or a checkpoint."""
    yield lambda: load(run_folder)
    yield lambda: load(base_folder)
    yield lambda: merge(run_folder, tmp_path / "merged", force=True)
    yield lambda: export(run_folder, "vllm", tmp_path / "exported", force=True)
    yield lambda: evaluate(run_folder, HARBOUR)
    yield lambda: validate(HARBOUR, base_folder)
    yield lambda: finetune(base_folder, HARBOUR, output_dir=tmp_path / "new", **FEW | {"max_steps": 1})
    again = FEW | {"max_steps": 3, "save_strategy": "steps", "resume_from_checkpoint": True}
    yield lambda: finetune(base_folder, HARBOUR, output_dir=run_folder, **again)


ADDED = (
    *("adapter_model.bin", "pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.pt", "model.ckpt"),
    *(
        "tf_model.h5",
        "flax_model.msgpack",
        "consolidated.00.pth",
        "scaler.pt",
        "optimizer.bin",
        "optimizer_0",
        "data.pkl",
    ),
    *("tokenizer.model", "tokenizer.pkl", "vocab.pkl", "spiece.model", "sentencepiece.bpe.model", "__init__.pkl"),
)
CHECKPOINT = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
INSTEAD = (
    *("model.safetensors", "adapter_model.safetensors", "config.json", "adapter_config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "manifest.json", "run.yaml", "metrics.jsonl"),
    *("model.safetensors.index.json", "processor_config.json", "preprocessor_config.json"),
)
KINDS = ("a plain pickle", "the zip of torch")


def is_ours(name):
    """Whether an error, by its name, is one of this package's."""
    found = getattr(errors, name, None)
    return found is not None and issubclass(found, LoraSftError)


def refuse_or_ignore(works, tmp_path):
    """Each work ends, well or with an error of ours, and starts nothing."""
    for work in works:
        outcome = apart(work)
        assert outcome.error is None or is_ours(outcome.error[0]), outcome.error
        assert "os.system" not in outcome.ran
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_malicious_pickles_beside_the_rest_never_run(kind, run, base, tmp_path):
    folders = [shutil.copytree(one, tmp_path / one.name) for one in (run.output_dir, base)]
    for folder in (*folders, *folders[0].glob("checkpoint-*")):
        for name in ADDED:
            (folder / name).write_bytes(malicious(tmp_path / "ran")[KINDS.index(kind)])
    refuse_or_ignore(everything(*folders, tmp_path), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*INSTEAD, *CHECKPOINT])
def test_a_malicious_pickle_instead_of_a_file_never_runs(name, kind, run, base, tmp_path):
    folders = [shutil.copytree(one, tmp_path / one.name) for one in (run.output_dir, base)]
    for folder in (*folders, *folders[0].glob("checkpoint-*")):
        (folder / name).write_bytes(malicious(tmp_path / "ran")[KINDS.index(kind)])
    whole = list(everything(*folders, tmp_path))
    refuse_or_ignore([whole[-1]] if name in CHECKPOINT else [whole[0], whole[1], whole[2], whole[-1]], tmp_path)


# --- R22 --------------------------------------------------------------------------------------------------

CODE = """
open({ran!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "planted"
class Model(LlamaForCausalLM):
    config_class = Config
class Speech(PreTrainedTokenizerFast):
    pass
def generate(*_, **__):
    pass
"""


def plant(folder, ran, **patches):
    for name in ("modeling_planted.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(ran=str(ran)))
    for name, patch in patches.items():
        file = folder / f"{name}.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | patch))


MODEL = {
    "AutoConfig": "modeling_planted.Config",
    "AutoModel": "modeling_planted.Model",
    "AutoModelForCausalLM": "modeling_planted.Model",
    "AutoTokenizer": [None, "modeling_planted.Speech"],
}
SPEECH = {"auto_map": {"AutoTokenizer": [None, "modeling_planted.Speech"]}, "tokenizer_class": "Speech"}
WAYS = {
    "model": {"config": {"auto_map": MODEL, "model_type": "planted"}},
    "model of a known type": {"config": {"auto_map": MODEL}},
    "tokenizer": {"tokenizer_config": SPEECH},
    "tokenizer in config.json": {"config": {"auto_map": {"AutoTokenizer": [None, "modeling_planted.Speech"]}}},
    "processor": {"processor_config": {"auto_map": {"AutoProcessor": "modeling_planted.Speech"}}},
    "generation": {"generation_config": {"custom_generate": "custom_generate"}},
    "everything": {"config": {"auto_map": MODEL}, "tokenizer_config": SPEECH},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_code_that_comes_with_a_model_does_not_run_whatever_is_typed(way, run, base, tmp_path):
    folders = [shutil.copytree(one, tmp_path / one.name) for one in (run.output_dir, base)]
    settings = folders[0] / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(folders[1])}))
    for folder in folders:
        plant(folder, tmp_path / "ran", **WAYS[way])
    for work in everything(*folders, tmp_path):
        outcome = apart(lambda work=work: answered_yes(work))
        assert outcome.error is None or is_ours(outcome.error[0]), outcome.error
        assert not (tmp_path / "ran").exists()


def answered_yes(work):
    """With `y` on standard input, for ever."""
    reader, writer = os.pipe()
    os.write(writer, b"y\n" * 100)
    os.dup2(reader, 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    work()


def test_the_code_of_these_tests_would_run(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    plant(folder, tmp_path / "ran", **WAYS["model of a known type"] | {"tokenizer_config": SPEECH})
    apart(lambda: load(folder, trust_remote_code=True))
    assert (tmp_path / "ran").exists()


# --- R27 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../outside/x.safetensors",
        "ABSOLUTE",
        "sub/../../outside/x.safetensors",
        "..",
        ".",
        "",
        "a\0b",
        "link.safetensors",
    ],
)
def test_a_shard_outside_the_models_folder_is_not_read(name, run, base, tmp_path):
    folder, outside = shutil.copytree(base, tmp_path / "base"), tmp_path / "outside"
    outside.mkdir()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(outside / "x.safetensors")
    (folder / "link.safetensors").symlink_to(outside / "x.safetensors")
    written = str(outside / "x.safetensors") if name == "ABSOLUTE" else name
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, written)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = shutil.copytree(run.output_dir, tmp_path / "adapter")
    (adapter / "manifest.json").unlink()
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(folder)}))
    for work in (
        lambda: load(folder),
        lambda: merge(adapter, tmp_path / "merged"),
        lambda: finetune(folder, HARBOUR, output_dir=tmp_path / "new", **FEW),
    ):
        with pytest.raises(ModelError, match=r"none of this folder|outside the model's folder|cannot be"):
            work()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 7}}, {"weight_map": {"a": None}}, 7]
)
def test_an_index_that_is_none_is_refused(index, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index"):
        load(folder)


def test_a_link_out_of_the_model_is_not_copied_into_the_merged_one(run, base, tmp_path):
    """Else a merged model that is published would hold somebody's private file under a harmless name."""
    (tmp_path / "secret").write_text("planted")
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    adapter = shutil.copytree(run.output_dir, tmp_path / "adapter")
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(folder)}))
    with pytest.raises(ModelError, match=r"notes.txt: is a link to .*secret, outside the model's folder"):
        merge(adapter, tmp_path / "merged")
    (folder / "notes.txt").unlink()
    (adapter / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"vocab.json: is a link to"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_links_of_the_hubs_cache_are_followed(run, base, tmp_path):
    """There a snapshot links to blobs that lie beside it."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    shutil.copytree(base, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    adapter = shutil.copytree(run.output_dir, tmp_path / "adapter")
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(snapshot)}))
    merge(adapter, tmp_path / "merged")


def files_under(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


OUT = ["../escaped", "../../escaped", "sub/../../escaped", "ABSOLUTE", "x/../../../escaped"]


@pytest.mark.parametrize("name", OUT)
def test_names_from_data_and_settings_write_nothing_elsewhere(name, base, tmp_path):
    """Whatever may become part of a file's name: the dataset's rows, template, token, target, tracker."""
    home = tmp_path / "home"
    home.mkdir()
    name = str(tmp_path / "escaped") if name == "ABSOLUTE" else name
    rows = [{"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": name}], "id": name}] * 4
    before = files_under(tmp_path)
    for settings in (
        {},
        {"chat_template": name},
        {"new_tokens": [name]},
        {"export_to": [name]},
        {"training_args": {"run_name": name}},
        {"chat_template_kwargs": {"name": name}},
        {"lora_init": name},
        {"dataset_split": name},
        {"training_args": {"logging_dir": name}},
    ):
        folder = home / "run"
        with suppress(UsageError):
            finetune(base, rows, output_dir=folder, data_cache=str(home / "cache"), **FEW | settings)
        written = files_under(tmp_path) - before
        assert all(one.startswith("home/") for one in written), written
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", ["../llama3", "/etc/passwd", "..", "../../templates/chatml", "x/../chatml"])
def test_a_template_is_found_by_its_name_not_by_a_way_out(name, tmp_path):
    with pytest.raises(UsageError, match="is not one of"):
        find_template(name, tmp_path)


def test_an_output_that_is_a_link_stays_where_it_points(run, tmp_path):
    """A link as the output folder is the user's own; what lies in it is never followed out of it."""
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "victim").write_text("mine")
    merge(run.output_dir, tmp_path / "link" / "merged")
    assert (tmp_path / "target" / "merged" / "model.safetensors").is_file()
    (tmp_path / "target" / ".other.part").symlink_to(tmp_path / "victim")
    with suppress(LoraSftError):
        merge(run.output_dir, tmp_path / "link" / "other")
    assert (tmp_path / "victim").read_text() == "mine"


def test_tensors_with_the_names_of_paths_are_refused(run, tmp_path):
    adapter = shutil.copytree(run.output_dir, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = next(iter(tensors))
    save_file(
        tensors | {"base_model.model.../../escaped": tensors[first].clone()}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(ModelError):
        merge(adapter, tmp_path / "merged", force=True)
