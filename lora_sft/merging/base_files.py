"""A base model's folder → its weight files, tensor by tensor, and the small files that go with them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_sft.errors import ModelError
from lora_sft.merging.tensor_file import StoredTensor, stored_tensors
from lora_sft.model.base import BaseSpec, inside, shards_of

SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
"""What goes with the weights: settings, tokenizer, and the code of models that bring their own."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SPEECH = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "vocab", "merges", "spiece")
"""How the names of tokenizer files begin."""


def base_folder(spec: BaseSpec) -> Path:
    """The folder of the base's files; of a hub model its snapshot, downloaded if need be.

    Raises:
        ModelError: it cannot be had.
    """
    folder = Path(spec.name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec.name, revision=spec.revision, allow_patterns=[*SMALL, "model*.safetensors"]))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(f"model {spec.name}: cannot be had: {str(error).splitlines()[0]}") from None


def weight_tensors(folder: Path) -> dict[str, StoredTensor]:
    """{name: where it lies}, of the files that transformers would read, in the order in which they lie there.

    Raises:
        ModelError: a file is missing, or is no safetensors file.
    """
    if (folder / INDEX).is_file():
        index = shards_of(folder)
        files = sorted(set(index.values()))
    elif (folder / WEIGHTS).is_file():
        index, files = None, [WEIGHTS]
    else:
        raise ModelError(f"{folder}: has neither {WEIGHTS} nor {INDEX}")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ModelError(f"{folder}: {INDEX} names {missing[0]}, which is not there")
    found = {}
    for file in files:
        stored = stored_tensors(folder / file)
        for name, tensor in sorted(stored.items(), key=lambda item: item[1].start):
            if index is None or index.get(name) == file:
                found[name] = tensor
    if index is not None and (lacking := index.keys() - found.keys()):
        raise ModelError(f"{folder}: {INDEX} names {min(lacking)}, which is not in its file")
    return found


def copy_small_files(
    base: Path, adapter: Path | None, folder: Path, patch: Mapping[str, Any], other_vocabulary: bool
) -> None:
    """Settings, tokenizer and code → `folder`.

    `config.json` is the base's own with `patch` in it: other readers know the form in which it was published. The
    tokenizer is the adapter's, where it has one.

    Args:
        other_vocabulary: the adapter added tokens; the base's other forms of its tokenizer do not hold.
    """
    brings_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    for pattern in SMALL:
        for file in base.glob(pattern):
            of_speech = file.name.startswith(SPEECH)
            if not file.name.endswith(".index.json") and not (of_speech and brings_tokenizer and other_vocabulary):
                inside(base, file.name)
                shutil.copyfile(file, folder / file.name)
    if adapter is not None and brings_tokenizer:
        for pattern in ("*.json", "*.jinja", "*.model", "*.txt"):
            for file in adapter.glob(pattern):
                if file.name.startswith(SPEECH) or file.name == "generation_config.json":
                    inside(adapter, file.name)
                    shutil.copyfile(file, folder / file.name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(_patched(config, patch), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _patched(config: dict[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with others in their place: where they stand, also inside `text_config`."""
    config = dict(config)
    for name, value in patch.items():
        written = "torch_dtype" if name == "dtype" and "dtype" not in config else name
        inner = config.get("text_config")
        if isinstance(inner, dict) and written in inner:
            config["text_config"] = {**inner, written: value}
        if written in config or not (isinstance(inner, dict) and written in inner):
            config[written] = value
    return config
