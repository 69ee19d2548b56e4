"""Prepared data, kept for the next run under a hash of everything that it depends on."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from lora_sft.chat.rendering import Rendered
from lora_sft.chat.turns import Note
from lora_sft.console import say
from lora_sft.data.intake import Intake
from lora_sft.data.problems import Problem
from lora_sft.data.sources import files_of
from lora_sft.model.disk import full_disk_told
from lora_sft.model.tokenizer import Speech
from lora_sft.preparation.prepare import First, Prepared
from lora_sft.preparation.store import Examples, temporary_file

KEPT = 20
"""So many prepared datasets are kept; the one that was not used for longest goes first."""

EXAMPLES, PREPARED, CHECKSUMS = "examples.arrow", "prepared.json", "checksums.json"

Made = tuple[Prepared, Intake, list[int]]


def cached(
    where: str, speech: Speech, sources: Sequence[tuple[Any, str]], how: Any, make: Callable[[Path], Made]
) -> Made:
    """What `make(path)` returns, read from the cache if it was made before from the same data in the same way.

    Args:
        where: a folder, `auto`, or `off`.
        sources: what was given as data, with the split.
        how: everything else that the result depends on.
        make: prepares the data; the examples go to the path that it is given.
    """
    identity = None if where == "off" else _identity(sources)
    if identity is None:
        return _made_for_now(make)
    root = cache_folder(where)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say("cache", f"off ({root}: {error.strerror})")
        return _made_for_now(make)
    key = _hash([identity, _speech_identity(speech), how, _code_identity()])
    folder = root / key
    staged = root / f"{key}.unfinished"
    with FileLock(root / f"{key}.lock"):
        if _is_whole(folder):
            say("cache", f"prepared before: {folder}")
            os.utime(folder)
            return _read(folder)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            with full_disk_told(staged, what=f"data_cache {root}"):
                made = make(staged / EXAMPLES)
                _write(staged, made)
                staged.rename(folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    _forget_the_oldest(root)
    return _read(folder)


def _made_for_now(make: Callable[[Path], Made]) -> Made:
    """What is kept until the process ends."""
    path = temporary_file()
    with full_disk_told(path, what=f"the folder for temporary files, {path.parents[1]}"):
        return make(path)


def _is_whole(folder: Path) -> bool:
    """Whether all files of a prepared dataset are there, to the bit; says so if one is damaged."""
    if not folder.is_dir():
        return False
    try:
        whole = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        damaged = [name for name in (EXAMPLES, PREPARED) if _file_hash(folder / name) != whole[name]]
    except (OSError, ValueError, KeyError, TypeError):
        damaged = [CHECKSUMS]
    if damaged:
        say("cache", f"{folder / damaged[0]} is damaged: prepared anew")
    return not damaged


def cache_folder(where: str) -> Path:
    """The folder that `auto` stands for, or the one that is named."""
    if where != "auto":
        return Path(where).expanduser()
    given = os.environ.get("LORA_SFT_CACHE")
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(home) if home else Path.home() / ".cache") / "lora_sft"


def _identity(sources: Sequence[tuple[Any, str]]) -> list[Any] | None:
    """What tells this data from any other; None if nothing does (a stream can be read only once)."""
    found: list[Any] = []
    for given, split in sources:
        if isinstance(given, (str, Path)):
            files = files_of(str(given))
            if files is None:
                return None  # the hub's answer is not known yet
            found.append([str(given), split, [[file.name, _file_hash(file)] for file in files]])
        elif hasattr(given, "_fingerprint"):
            found.append([given._fingerprint, split])
        elif isinstance(given, dict) and all(hasattr(part, "_fingerprint") for part in given.values()):
            found.append([{name: part._fingerprint for name, part in given.items()}, split])
        elif isinstance(given, (list, tuple)):
            try:
                found.append([json.dumps(given), split])
            except (TypeError, ValueError):
                return None
        else:
            return None
    return found


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return (
            hashlib.file_digest(stream, "blake2b").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)
        )


def _digest(stream: Any) -> str:
    digest = hashlib.blake2b()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _speech_identity(speech: Speech) -> list[Any]:
    tokenizer = speech.tokenizer
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return [_hash(vocabulary), str(tokenizer.chat_template), tokenizer.special_tokens_map, speech.stop_tokens]


def _code_identity() -> str:
    """A hash of the code that makes examples of rows: another version may make others."""
    package = Path(__file__).parents[1]
    files = [*sorted((package / "chat").glob("*.py")), *sorted((package / "data").glob("*.py"))]
    files += sorted((package / "preparation").glob("*.py"))
    return _hash([file.read_text(encoding="utf-8") for file in files])


def _hash(value: Any) -> str:
    text = json.dumps(
        value, sort_keys=True, default=lambda v: asdict(v) if is_dataclass(v) and not isinstance(v, type) else str(v)
    )
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _write(folder: Path, made: Made) -> None:
    prepared, intake, ends = made
    plain = {name: value for name, value in vars(prepared).items() if name not in ("examples", "first")}
    account = {name: value for name, value in vars(intake).items() if not name.startswith("_")}
    account |= {"problems": [asdict(problem) for problem in intake.problems], "bad": [_row(bad) for bad in intake.bad]}
    document = {
        "prepared": plain,
        "first": {**prepared.first._asdict(), "rendered": asdict(prepared.first.rendered)},
        "intake": account,
        "ends": ends,
    }
    (folder / PREPARED).write_text(json.dumps(document, default=str), encoding="utf-8")
    checksums = {name: _file_hash(folder / name) for name in (EXAMPLES, PREPARED)}
    (folder / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")


def _row(bad: tuple[Problem, Any]) -> list[Any]:
    return [asdict(bad[0]), bad[1]]


def _read(folder: Path) -> Made:
    document = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
    first = document["first"]["rendered"]
    rendered = Rendered(
        first["text"],
        [(start, end) for start, end in first["supervised"]],
        [Note(*note) for note in first["notes"]],
        [(start, end) for start, end in first["literal"]],
        first["replies"],
    )
    shown = First(**{**document["first"], "rendered": rendered})
    account = document["intake"]
    intake = Intake(rows=account["rows"], usable=account["usable"], grave=account["grave"])
    intake.layouts.update(account["layouts"])
    intake.unused.update(account["unused"])
    intake.duplicates = account["duplicates"]
    intake.problems = [Problem(**problem) for problem in account["problems"]]
    intake.bad = [(Problem(**problem), value) for problem, value in account["bad"]]
    return Prepared(Examples(folder / EXAMPLES), first=shown, **document["prepared"]), intake, document["ends"]


def _forget_the_oldest(root: Path) -> None:
    folders = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for folder in folders[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            (root / f"{folder.name}.lock").unlink()
