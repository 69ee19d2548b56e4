"""Bytes that grow towards new code → the readers of rows and of settings; whatever is not one of our errors is a find.

`python -m bench.fuzz [SECONDS] [TARGET…]` gives each target so many seconds (60) in a process of its own. With atheris
(`pip install atheris`: Linux, CPython 3.11 to 3.13) the bytes are guided by the code that they reach; without it, they
are seeds changed at random. A find is printed, and its bytes lie in the folder that is named; it becomes a test.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROW = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
CALL = (
    b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "tool_calls": '
    b'[{"id": "1", "function": {"name": "f", "arguments": "{\\"a\\": 1e5}"}}]}, {"role": "tool", "content": "1"}, '
    b'{"role": "assistant", "content": "a", "weight": 0, "reasoning_content": "r"}], "tools": [{"name": "f"}]}'
)
KINDS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
TEXTS = [ROW, CALL, b'{"conversations": [{"from": "gpt", "value": "\\ud83d\\ude00"}]}', b'{"text": null, "text": NaN}']
TEXTS += [b'{"instruction": "q", "input": "", "output": "a", "history": [["q", "a"]], "system": "s"}']
TEXTS += [b'{"prompt": [], "completion": "a"}', b'{"input_ids": [1, 2], "labels": "[-100, 2]"}']
SEEDS: dict[str, list[bytes]] = {
    "rows": [
        *(bytes([kind]) + text for text in TEXTS for kind in (0, 1)),
        b"\x01[" + b",\n".join(TEXTS[:3]) + b"]",
        b'\x02prompt,completion\n"q\n""q",a\n\n1;2\n',
        b"\x00\xef\xbb\xbf" + ROW,
    ],
    "settings": [
        b"model: a/b\nlora_r: 8\nlearning_rate: 2e-4\ndataset: [{path: a.jsonl, weight: 2}]\n",
        b"lora_target_modules: q_proj,v_proj\nbf16: yes\nwarmup_ratio: .03\nadam_beta2: 0.9\n? [1]\n: !!int '3'\n",
        b"base_model: x\nval_set_size: 0.1\ntrain_on_inputs: false\nmicro_batch_size: 2\n<<: {a: 1}\n&a [*a]\n",
    ],
    "words": [
        b"--learning-rate\n2e-4\n--no-packing\nseed=7\n--lora-target-modules\nq_proj,v_proj\n--bf16\n",
        b"training_args.adam_beta2=0.9\n--roles\nbot=assistant\n--report-to\nnone\n--load_in_4bit\nfalse\n",
    ],
}


def read_rows(data: bytes) -> None:
    """A file of any kind: every row is taken or told, and what is taken can be told apart from its source."""
    from lora_sft.data import sources
    from lora_sft.data.intake import Intake
    from lora_sft.errors import DataError

    kind, content = KINDS[data[0] % len(KINDS)] if data else KINDS[0], data[1:]
    file = Path(tempfile.gettempdir()) / f"lora_sft-fuzz-{os.getpid()}{kind}"
    file.write_bytes(content)
    intake, taken = Intake(), []
    with contextlib.suppress(DataError):
        taken = list(intake.conversations(sources.read_rows(file)))
        assert intake.rows == intake.usable + intake.grave, "rows are lost"
        assert len(taken) == intake.usable
    file.unlink()
    for problem in intake.problems:
        assert str(problem).startswith(file.name), f"a problem without a place: {problem}"
    for one in taken:
        assert one.messages or one.text or one.input_ids, "an empty conversation is taken"
        json.dumps([one.messages, one.tools], allow_nan=False).encode()
    intake.bad_rows().encode()


def read_settings(data: bytes) -> None:
    """A YAML file: settings, or one of our errors; what is written down of them reads as the same."""
    from lora_sft.errors import SettingError
    from lora_sft.settings import read_file, resolve, to_yaml

    file = Path(tempfile.gettempdir()) / f"lora_sft-fuzz-{os.getpid()}.yaml"
    with contextlib.suppress(SettingError):
        file.write_bytes(data)
        config = resolve(read_file(file))
        file.write_text(to_yaml(config), encoding="utf-8")
        assert str(resolve(read_file(file))) == str(config), "written and read again, they are others"  # NaN ≠ NaN
    file.unlink(missing_ok=True)


def read_words(data: bytes) -> None:
    """The words of a command line: settings, or one of our errors."""
    from lora_sft.errors import SettingError
    from lora_sft.settings import from_words, resolve

    with contextlib.suppress(SettingError):
        resolve(from_words(data.decode("utf-8", "surrogateescape").split("\n")))


TARGETS: dict[str, Callable[[bytes], None]] = {"rows": read_rows, "settings": read_settings, "words": read_words}


def hunt(name: str, seconds: float, finds: Path) -> None:
    """Tries one target for so long; ends the process, not with 0 if something was found."""
    try:
        import atheris
    except ImportError:
        hunt_at_random(name, seconds, finds)
        return
    with atheris.instrument_imports(include=["lora_sft", "json", "csv", "yaml"]):
        import lora_sft.data.intake
        import lora_sft.settings  # noqa: F401
    corpus = finds / "corpus"
    corpus.mkdir(parents=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / str(number)).write_bytes(seed)
    limits = [f"-max_total_time={max(1, round(seconds))}", "-timeout=10", "-max_len=4096", "-rss_limit_mb=2048"]
    places = [f"-artifact_prefix={finds}/", "-print_final_stats=1", "-verbosity=0", str(corpus)]
    atheris.Setup([sys.argv[0], *limits, *places], TARGETS[name])
    with silent():
        atheris.Fuzz()


def hunt_at_random(name: str, seconds: float, finds: Path) -> None:
    """As `hunt`, without knowing what code is reached."""
    finds.mkdir(parents=True, exist_ok=True)
    dice, tried, end = random.Random(name), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data, tried = changed(dice, bytearray(dice.choice(SEEDS[name]))), tried + 1
        try:
            with silent():
                TARGETS[name](data)
        except Exception:
            (finds / "crash-at-random").write_bytes(data)
            raise
    print(f"stat::number_of_executed_units: {tried}", file=sys.stderr)


def changed(dice: random.Random, data: bytearray) -> bytes:
    """Bytes with some others in their place, left out, or doubled."""
    words = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"\n",
        b"\\u0000",
        b"null",
        b"1e999",
        b"-",
        b"\xff",
        b"!!",
        b"&a",
    ]
    for _ in range(dice.randrange(1, 8)):
        place, length = dice.randrange(len(data) + 1), dice.randrange(1, 12)
        piece = dice.choice([dice.choice(words), dice.randbytes(1), bytes(data[place : place + length]), b""])
        data[place : place + dice.choice([0, len(piece), length])] = piece
    return bytes(data)


@contextlib.contextmanager
def silent() -> Any:
    """What is said to people along the way goes nowhere."""
    from lora_sft import console

    with open(os.devnull, "w", errors="backslashreplace") as nowhere:  # noqa: PTH123 - no file of ours
        quiet, was = console.console(), console.console().file
        quiet.file = nowhere
        try:
            yield
        finally:
            quiet.file = was


def run(name: str, seconds: float, finds: Path) -> subprocess.CompletedProcess[str]:
    """One target in a process of its own."""
    words = [sys.executable, "-m", "bench.fuzz", "--in-this-process", name, str(seconds), str(finds)]
    return subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def main(words: list[str]) -> int:
    """Runs the targets one after the other; how many of them found something."""
    if words[:1] == ["--in-this-process"]:
        hunt(words[1], float(words[2]), Path(words[3]))
        return 0
    seconds = float(words[0]) if words else 60
    found = 0
    for name in words[1:] or TARGETS:
        finds = Path(tempfile.mkdtemp(prefix=f"lora_sft-fuzz-{name}-"))
        done = run(name, seconds, finds / "finds")
        tried = done.stderr.partition("number_of_executed_units:")[2].split("\n")[0].strip()
        print(f"{name}: {tried or '?'} inputs in {seconds:g} s, {'nothing found' if not done.returncode else 'A FIND'}")
        if done.returncode:
            found += 1
            print(done.stdout + done.stderr, f"\nbytes: {finds}")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
