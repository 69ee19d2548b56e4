"""An adapter or a merged model → the files of it that anybody may see: no path of this machine, no secret, no data."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lora_sft.config import RunConfig
from lora_sft.errors import SettingError, UsageError
from lora_sft.model.loading import MANIFEST
from lora_sft.settings import read_file, resolve, to_yaml
from lora_sft.training.output import METRICS, SETTINGS

MERGE_RECORD = "merge.json"
"""In a merged model's folder: base, dtype, "onto", "quantize", "adapters" with weight and sha256, and "verified"."""

SPEECH_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model*.safetensors", *SPEECH_FILES, MANIFEST, SETTINGS, METRICS)
MODEL_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    *SPEECH_FILES,
    MERGE_RECORD,
)
BASE_FILES = ("*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""What is sent of an adapter, of a merged model, and with the latter of its base: code that `config.json` names, and
licences. Everything else stays: checkpoints, pages that show rows of the data, the state of the trainer."""

WORD_LISTS = ("tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
"""Files in which any string may stand as a token, a path as well."""

LITERAL = frozenset({"new_tokens", "stop_tokens", "lora_target_modules", "chat_template_kwargs"})
"""Names whose values are words of a model, though they may begin like a path."""

SECRET_NAME = re.compile(r"(hub_|auth_|access_|use_auth_|push_to_hub_)?token|.*(api_?key|passw(or)?d|secret).*", re.I)
SECRETS = {
    "an access token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a name with its password": re.compile(r"\w://[^\s/@:\"']+:[^\s/@\"']+@"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
HOME = re.compile(r"(?<![\w.])/((home|Users)/[\w.-]+|root)/|[A-Za-z]:\\{1,2}Users\\")


def is_hub_name(name: object) -> bool:
    """Whether a name is one of the hub, `owner/name` or `name`, and not that of a folder here."""
    return isinstance(name, str) and bool(name) and has_hub_form(name) and not Path(name).exists()


def has_hub_form(name: str) -> bool:
    """Whether the hub would take a name for a repository, though a folder here may bear it as well."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_path(text: str) -> bool:
    """Whether a string is written like a path from the root, the home folder, or the folder here."""
    if "\n" in text or re.match(r"\w+://", text):
        return text.startswith("file://")
    written = text.startswith(("/", "~/", "./", "../", "\\\\")) or re.match(r"[A-Za-z]:[\\/]", text) is not None
    return written and len(re.findall(r"[\w.-]+", text)) > 0


def public_name(name: str) -> str:
    """A path → its last part; any other name as it is."""
    if is_path(name) or Path(name).is_dir():
        kind = PureWindowsPath if "\\" in name else PurePosixPath
        return kind(name).name or name
    return name


def without_paths(value: Any, name: str = "") -> Any:
    """A value of JSON or YAML → the same with every path cut to its last part, and what is named a secret left out."""
    if isinstance(value, Mapping):
        return {
            key: without_paths(part, str(key))
            for key, part in value.items()
            if not (isinstance(part, str) and SECRET_NAME.fullmatch(str(key)))
        }
    if isinstance(value, list):
        return [without_paths(part, name) for part in value]
    if isinstance(value, str) and name not in LITERAL and is_path(value):
        return public_name(value)
    return value


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file; empty if it is not there."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def read_run(folder: Path) -> RunConfig | None:
    """The settings of a run from its `run.yaml`; None if there is none that this version reads."""
    if not (folder / SETTINGS).is_file():
        return None
    try:
        return resolve(read_file(folder / SETTINGS))
    except SettingError:
        return None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; none if it is not there, or cannot be read."""
    file = folder / METRICS
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    except ValueError:
        return []


def copy_public(source: Path, target: Path, base: str | None, patterns: Sequence[str]) -> list[str]:
    """Copies what belongs to an adapter or a merged model, made public; weights are linked where the disk allows it.

    Args:
        base: the hub name that the base is called by; None leaves the last part of its path.
        patterns: which files, as `ADAPTER_FILES`.

    Returns:
        What stayed behind, by name.
    """
    here = sorted(file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file())
    sent = [name for name in here if any(fnmatch(name, pattern) for pattern in patterns) and not _is_deeper(name)]
    for name in sent:
        (target / name).parent.mkdir(exist_ok=True)
        _copy(source / name, target / name, base)
    return sorted({name.partition("/")[0] for name in here if name not in sent})


def _is_deeper(name: str) -> bool:
    """Whether a file lies in a folder of its own, such as a checkpoint; `*` of a pattern also matches a slash."""
    return "/" in name and not name.startswith("additional_chat_templates/")


def _copy(source: Path, target: Path, base: str | None) -> None:
    if source.suffix == ".safetensors":
        _link(source, target)
    elif source.name == SETTINGS:
        if config := read_run(source.parent):
            target.write_text(_public_settings(config, base), encoding="utf-8")
    elif source.suffix == ".json" and not _holds_words(source.name):
        content = read_json(source)
        public = _cleaned(content, source.name) | _base_named(content, source.name, base)
        same = public == content
        target.write_bytes(source.read_bytes()) if same else target.write_text(_json(public), encoding="utf-8")
    else:
        shutil.copyfile(source, target)


def _cleaned(content: dict[str, Any], name: str) -> dict[str, Any]:
    """`without_paths` of a JSON file; of a tokenizer's only where it was loaded from, for its tokens are any string."""
    if name.startswith(("tokenizer", "special_tokens", "added_tokens")):
        return {key: value for key, value in content.items() if key not in ("name_or_path", "tokenizer_file")}
    cleaned: dict[str, Any] = without_paths(content)
    return cleaned


def _base_named(content: Mapping[str, Any], name: str, base: str | None) -> dict[str, Any]:
    """The fields of a file that name the base, with the name that is public."""
    if base is None:
        return {}
    if name == "adapter_config.json":
        another = content.get("base_model_name_or_path") != base
        return {"base_model_name_or_path": base} | ({"revision": None} if another else {})
    if name in (MANIFEST, MERGE_RECORD) and isinstance(recorded := content.get("base"), Mapping):
        lost = {} if recorded.get("name") == base else {key: None for key in ("revision", "commit") if key in recorded}
        return {"base": {**recorded, "name": base, **lost}}
    return {}


def _public_settings(config: RunConfig, base: str | None) -> str:
    public = without_paths(config.model_dump())
    if base is not None:
        public["model_name_or_path"] = base
    note = "Every setting of the run; of folders and files only the last part of their path."
    return to_yaml(RunConfig.model_validate(public), note)


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the two lie on different disks."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _holds_words(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WORD_LISTS)


def _is_of_the_base(name: str) -> bool:
    """Whether a file's words are those of the base's makers: a template or a token may name any folder."""
    return name.endswith((".jinja", ".py")) or any(fnmatch(name, pattern) for pattern in SPEECH_FILES)


def refuse_leaks(folder: Path, private: Sequence[str | Path], token: str | None) -> None:
    """Looks through every file that will be sent.

    Args:
        private: paths of this machine that must not be named.
        token: the access token, which must stand in no file.

    Raises:
        UsageError: names every file with what stands in it.
    """
    paths = {str(form) for path in private for form in (Path(path), Path(path).resolve())}
    paths = {path for path in paths if path.count(os.sep) > 1}  # /tmp may be a word of the model
    problems = []
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        text = _text_of(file)
        found = [what for what, pattern in SECRETS.items() if pattern.search(text)]
        found += ["the access token of this machine"] if token and token in text else []
        found += [f"a path of this machine ({path})" for path in sorted(paths) if path in text]
        if not _is_of_the_base(file.name) and (home := HOME.search(text)):
            found.append(f"a path of a machine ({home.group()}…)")
        problems += [f"{file.relative_to(folder)}: holds {what}" for what in found]
    if problems:
        raise UsageError(f"nothing was sent: {UsageError.of(problems)}; take it out of the file, and export again")


def _text_of(file: Path) -> str:
    """What can be read in a file; of weights what is written at their head."""
    if file.suffix != ".safetensors":
        return file.read_text(encoding="utf-8", errors="replace")
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return json.dumps(json.loads(stream.read(size)).get("__metadata__", {}))
