"""A merge or an export that is killed leaves nothing under the final name, and the base and the adapter as they were.

Each process to be killed is forked from this one, which has imported everything. An audit hook counts what changes the
file system, and kills the process right before the n-th change, for every n. Changes that Rust makes (safetensors,
tokenizers) are not seen by the hook; they lie between two that are.
"""

import os
import shutil
import signal
import sys
import threading
from itertools import count

import pytest
from transformers import AutoModelForCausalLM

from lora_sft.api import export, merge
from lora_sft.errors import OutputError
from tests.reliability.conftest import hashes_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.copyfile"}


def is_change(event, arguments):
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        return bool(flags & (os.O_WRONLY | os.O_RDWR)) if isinstance(flags, int) else "w" in (mode or "")
    return event in CHANGES


def killed(work, number):
    """Runs `work` in a fork that dies right before its change of that number; False if it ended before."""
    child = os.fork()
    if child == 0:
        seen = count()
        lock = threading.Lock()

        def hook(event, arguments):
            if is_change(event, arguments):
                with lock:
                    if next(seen) == number:
                        os.kill(os.getpid(), signal.SIGKILL)

        try:
            signal.alarm(60)  # a child that hangs is no child that was killed
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.addaudithook(hook)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def kill_at_every_change(work, output, inputs):
    """How many times `work` was killed; what must hold is looked at each time."""
    before = [hashes_of(folder) for folder in inputs]
    number = 0
    while killed(work, number):
        number += 1
        assert [hashes_of(folder) for folder in inputs] == before, number
        if output.exists():  # killed behind the renaming: it is whole
            if (output / "config.json").exists():
                AutoModelForCausalLM.from_pretrained(output)
            assert not output.with_name(f".{output.name}.part").exists()
            shutil.rmtree(output)
    return number


@pytest.mark.slow
@pytest.mark.parametrize("verify", ["tensors", "no"])
def test_a_merge_at_every_change(verify, small_run, smallest_base, tmp_path):
    output = tmp_path / "merged"
    inputs = (small_run, smallest_base)
    assert kill_at_every_change(lambda: merge(small_run, output, verify=verify), output, inputs) > 10
    whole = hashes_of(output)
    merge(small_run, tmp_path / "undisturbed" / "merged", verify=verify)
    assert whole == hashes_of(tmp_path / "undisturbed" / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "undisturbed"}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["adapter", "vllm"])
def test_an_export_at_every_change(target, small_run, smallest_base, tmp_path):
    output = tmp_path / "out"
    inputs = (small_run, smallest_base)
    assert kill_at_every_change(lambda: export(small_run, target, output), output, inputs) > 8
    whole = hashes_of(output)
    export(small_run, target, tmp_path / "undisturbed" / "out")
    other = hashes_of(tmp_path / "undisturbed" / "out")
    assert whole.keys() == other.keys()
    assert whole["adapter_config.json"] == other["adapter_config.json"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "undisturbed"}


@pytest.mark.parametrize("verb", ["merge", "export"])
@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("base", "exists already"),
        ("base/merged", "lies inside the model"),
        ("base/a/../b/merged", "lies inside the model"),
        ("link", "exists already"),
        ("link/merged", "lies inside the model"),
        ("adapter", "exists already"),
    ],
)
def test_an_output_in_the_way_is_refused_and_nothing_is_touched(verb, where, words, small_run, smallest_base, tmp_path):
    (tmp_path / "link").symlink_to(smallest_base)
    first, _, rest = where.partition("/")
    output = {"base": smallest_base, "link": tmp_path / "link", "adapter": small_run}[first] / rest
    before = [hashes_of(folder) for folder in (small_run, smallest_base)]
    times = [folder.stat().st_mtime_ns for folder in (small_run, smallest_base)]
    with pytest.raises(OutputError, match=words):
        merge(small_run, output) if verb == "merge" else export(small_run, "vllm", output)
    assert [hashes_of(folder) for folder in (small_run, smallest_base)] == before
    assert [folder.stat().st_mtime_ns for folder in (small_run, smallest_base)] == times


def test_two_merges_into_one_folder(small_run, tmp_path):
    """The second is refused while the first one lives; the lock of a dead one is none."""
    output = tmp_path / "merged"
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        from lora_sft.merging.staging import staged

        with staged(output):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(OutputError, match="another process is writing it"):
        merge(small_run, output)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    merge(small_run, output, verify="no")
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}
