"""The disk is full at every page that is written: one error, nothing under the final name, what was there still loads.

A page of 4 KiB is the smallest room that a disk in memory gives out, so that each write that needs one is the first to
fail in one of the cases. Raise the room by a page at a time until there is enough.
"""

import re
import shutil
from itertools import count

import pytest
from transformers import AutoModelForCausalLM

from lora_sft import evaluate, finetune
from lora_sft.api import export, merge
from lora_sft.errors import LoraSftError, OutputError
from lora_sft.exporting import gguf
from lora_sft.exporting.llama_cpp.converter import the_converter
from lora_sft.merging import merge as merging
from lora_sft.model.tiny import save_tiny
from lora_sft.training.output import OutputFolder
from tests.cli.test_commands import run as command
from tests.conftest import HARBOUR
from tests.reliability.conftest import SMALL_RUN

pytestmark = pytest.mark.slow

NEEDED = r"^{where}: the disk is full: at least [\d,]+ bytes are needed, [\d,]+ are free; make room, or name a folder"


def refused(write, kind=OutputError):
    """What `write` was refused with; None if it succeeded."""
    try:
        write()
    except kind as error:
        return str(error)
    return None


def fill(disk, write, where, step=1):
    """Lets `write` run with ever more room until it succeeds; how often it did not."""
    before = disk.hashes()
    for cases in count():
        disk.leave(cases * step)
        words = refused(write)
        if words is None:
            break
        assert re.match(NEEDED.format(where=re.escape(str(where))), words), words
        needed, free = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:bytes|are free)", words))
        assert needed > free, words
        assert disk.hashes() == before, words
    return cases


@pytest.fixture
def there(disk, small_run):
    """An adapter and an earlier merge that lie on the disk before it fills up."""
    adapter = shutil.copytree(small_run, disk.path / "adapter", copy_function=shutil.copyfile)
    merge(adapter, disk.path / "earlier", verify="no")
    return adapter


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "verify": "tensors"}], ids=["as trained", "16 bits"])
def test_a_merge(options, disk, there, monkeypatch):
    monkeypatch.setattr(merging, "check_room", lambda *_: None)
    output = disk.path / "merged"
    assert fill(disk, lambda: merge(there, output, **options), output) > 15
    assert AutoModelForCausalLM.from_pretrained(output).config.hidden_size == 16


def test_a_merge_that_quantizes_last(disk, harbour_texts, tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base", harbour_texts, num_hidden_layers=1, intermediate_size=64)
    finetune(base, HARBOUR, output_dir=tmp_path / "run", **SMALL_RUN)
    monkeypatch.setattr(merging, "check_room", lambda *_: None)
    output = disk.path / "merged"
    assert fill(disk, lambda: merge(tmp_path / "run", output, quantize="nf4", verify="no"), output, step=8) > 10


def test_a_merge_knows_beforehand(disk, there, capsys):
    before = disk.hashes()
    disk.leave(1)
    code, out, err = command(capsys, "merge", there, "--output", disk.path / "merged")
    assert (code, out, err.count("error: ")) == (2, "", 1)
    assert re.search(r"0.00 GiB are needed, 0.00 GiB are free; make room", err.replace("\n", " "))
    assert disk.hashes() == before


@pytest.mark.parametrize("target", ["adapter", "vllm", "mlx-adapter", "mlx"])
def test_an_export(target, disk, there):
    if target == "mlx":
        pytest.importorskip("mlx")
    output = disk.path / "out"
    assert fill(disk, lambda: export(there, target, output), output) > 7


def test_an_export_to_gguf(disk, there, monkeypatch):
    try:
        the_converter()
    except Exception as error:
        pytest.skip(f"no converter here: {error}")
    monkeypatch.setattr(gguf, "check_room", lambda *_: None)
    output = disk.path / "out"
    assert fill(disk, lambda: export(there, "gguf", output), output, step=8) > 1


def test_the_cache_of_prepared_data(disk, small_run, smallest_base, tmp_path):
    where = disk.path / "cache"

    def train():
        shutil.rmtree(where, ignore_errors=True)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        finetune(smallest_base, HARBOUR, output_dir=tmp_path / "run", data_cache=str(where), **SMALL_RUN)

    for cases in count():
        disk.leave(cases)
        words = refused(train)
        if words is None:
            break
        assert re.match(NEEDED.format(where=f"data_cache {re.escape(str(where))}"), words), words
        assert not [path for path in where.iterdir() if path.is_dir()]
        assert not (tmp_path / "run").exists()
    assert cases > 4


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_the_save_of_a_run(strategy, disk, there, smallest_base, tmp_path, monkeypatch):
    """What is kept of an unfinished run is checkpoints that load, and nothing that is called finished."""
    monkeypatch.setattr(OutputFolder, "check_room", lambda *_: None)
    before, folder = disk.hashes(), disk.path / "run"
    undisturbed = finetune(smallest_base, HARBOUR, output_dir=tmp_path / "run", **SMALL_RUN)
    settings = SMALL_RUN | {"save_strategy": strategy, "save_steps": 1, "output_dir": folder}
    for cases in count():
        shutil.rmtree(folder, ignore_errors=True)
        disk.leave(2 * cases)
        words = refused(lambda: finetune(smallest_base, HARBOUR, **settings), LoraSftError)
        if words is None:
            break
        assert re.match(NEEDED.format(where=rf"(output_dir )?{re.escape(str(folder))}\S*"), words), words
        assert not (folder / "manifest.json").exists()
        now = disk.hashes()
        assert {name: now.get(name) for name in before} == before
        disk.leave(100)
        loss = finetune(smallest_base, HARBOUR, **settings).metrics["last_loss"]  # the same again goes on where it was
        assert loss == undisturbed.metrics["last_loss"]
    assert cases > 8
    assert evaluate(folder, HARBOUR)["loss"] > 0
