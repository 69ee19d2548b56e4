"""Fuzzing finds nothing in a bounded time, and what it once found stays mended."""

import pytest

from bench.fuzz import TARGETS, run
from lora_sft.errors import SettingError
from lora_sft.settings import from_words, read_file, resolve

SECONDS = 10


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(name, tmp_path):
    done = run(name, SECONDS, tmp_path / "finds")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stderr.partition("number_of_executed_units:")[2].split()[0]) > 500


@pytest.mark.parametrize(
    "yaml",
    ["? [1]\n: 2", "? {a: 1}\n: 2", "roles: {? [user] : user}", "seed: !!int", "seed: !!bool x", "seed: !!timestamp x"],
)
def test_yaml_on_which_its_reader_stumbles_is_told(yaml, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml)
    with pytest.raises(SettingError, match=r"run.yaml:"):
        read_file(tmp_path / "run.yaml")


def test_a_value_that_has_no_parts_is_told():
    with pytest.raises(SettingError, match="beta"):
        resolve(from_words(["beta=1", "beta.x=2"]))
