"""A base model → a short text that another base does not have, from its files without reading them whole.

It tells an adapter's base from another of the same shape, and the base of a run from one that was put in its place. It
is no proof against somebody who changes single weights on purpose.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_sft.errors import ModelError
from lora_sft.model.base import BaseSpec

if TYPE_CHECKING:
    from torch import nn

BLOCKS = 64
BLOCK_BYTES = 4096
"""Of every file so many blocks are read, evenly spread over it; of a smaller one everything."""


def fingerprint_of(spec: BaseSpec) -> str:
    """sha256 over `config.json` and, of every weight file, its size, its header and blocks at fixed places.

    The weight files are those that transformers reads: named by the index, else `model.safetensors`, else all there
    are. A copy of the files in another folder, or under another hub name, has the same fingerprint.

    Raises:
        ModelError: the model is neither a folder nor in the hub's cache, or a file is missing or no safetensors file.
    """
    digest = hashlib.sha256()
    try:
        config = _file(spec, "config.json")
        if config is None:
            raise ModelError(f"model {spec.name}: no config.json, neither in a folder nor in the hub's cache")
        _add(digest, config.read_bytes())
        for name in _weight_files(spec):
            file = _file(spec, name)
            if file is None:
                raise ModelError(f"model {spec.name}: {name} is missing")
            with file.open("rb") as opened:
                _add_samples(digest, opened, file)
    except OSError as error:
        raise ModelError(f"model {spec.name}: cannot be read: {error}") from None
    return digest.hexdigest()


def fingerprint_of_loaded(model: "nn.Module") -> str:
    """The same for a model that was given loaded, before an adapter is attached: of each weight its shape and samples.

    It differs from that of the files which the model may have come from.
    """
    import torch

    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if isinstance(weight, torch.Tensor):
            flat = weight.detach().flatten()
            places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), BLOCKS), device=flat.device).long()
            values = flat[places].contiguous().view(torch.uint8).cpu().numpy().tobytes()
            _add(digest, f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            _add(digest, values)
    return digest.hexdigest()


def stored_bytes(spec: BaseSpec) -> int | None:
    """What the weight files of a model take on the disk; None if it is neither a folder nor in the hub's cache."""
    try:
        files = [_file(spec, name) for name in _weight_files(spec)]
        return sum(file.stat().st_size for file in files if file is not None)
    except (ModelError, OSError):
        return None


def _file(spec: BaseSpec, name: str) -> Path | None:
    """Where a file of the model lies; None if it is not there. Nothing is downloaded."""
    folder = Path(spec.name).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(spec.name, name, revision=spec.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _weight_files(spec: BaseSpec) -> list[str]:
    """Names of the files that transformers reads, in order."""
    index = _file(spec, "model.safetensors.index.json")
    if index is not None:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if _file(spec, "model.safetensors") is not None:
        return ["model.safetensors"]
    found = sorted(file.name for file in Path(spec.name).expanduser().glob("*.safetensors"))
    if not found:
        raise ModelError(f"model {spec.name}: no .safetensors file")
    return found


def _add_samples(digest: Any, opened: BinaryIO, file: Path) -> None:
    """Size, header and blocks of one safetensors file."""
    size = opened.seek(0, 2)
    opened.seek(0)
    start = opened.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if 8 + header > size:
        raise ModelError(f"{file}: is no safetensors file, or was cut off")
    _add(digest, str(size).encode())
    _add(digest, opened.read(header))
    first, room = 8 + header, size - 8 - header
    if room <= BLOCKS * BLOCK_BYTES:
        _add(digest, opened.read())
        return
    for number in range(BLOCKS):
        opened.seek(first + number * (room - BLOCK_BYTES) // (BLOCKS - 1))
        _add(digest, opened.read(BLOCK_BYTES))


def _add(digest: Any, part: bytes) -> None:
    """Adds a part with its length, so that no other parts give the same whole."""
    digest.update(struct.pack("<Q", len(part)))
    digest.update(part)


def hash_of_file(file: Path) -> str:
    """The SHA-256 of a file's bytes, all of them, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
