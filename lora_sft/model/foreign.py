"""An adapter folder, from anybody → what its settings say, after a look at whether they can be believed.

What lies in the folder decides which base is loaded and how its weights are changed. So the settings are looked at
before PEFT reads them, and they, the weights and the base are compared with what the run wrote into `manifest.json`.
"""

import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_sft.errors import ModelError
from lora_sft.model.base import BaseSpec
from lora_sft.model.fingerprint import fingerprint_of, hash_of_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE_RECORD = "merge.json"
SETTINGS_BYTES = 2**24
MOST_LAYERS, MOST_TOKENS = 10_000, 2**22
"""More than any model has; what is named beyond would fill memory or disk before it is found wrong."""

SECONDS = 5.0
"""For all patterns of an adapter on all names of its base."""

NO_MATTER = frozenset(
    ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "runtime_config")
)
"""Settings that change nothing of what the adapter does."""

MATCH = (
    "import json,re,sys\n"
    "patterns,names=json.load(sys.stdin)\n"
    "forms=['({})','(.*\\\\.)?({})$','(^|.*\\\\.){}($|\\\\..*)','(?:^|.*?\\\\.){}\\\\.(?P<idx>\\\\d+)\\\\.']\n"
    "for one in [re.compile(form.replace('{}',pattern)) for pattern in patterns for form in forms]:\n"
    "    for name in names: one.match(name); one.fullmatch(name)\n"
)
"""As PEFT 0.21 uses a pattern, in a process that can be ended."""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a folder whose weights are in the format that runs no code.

    Raises:
        ModelError: no adapter there, weights in another format, or settings that no training writes; names them all.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(f"{folder}: no adapter here (no {CONFIG})")
    if file.stat().st_size > SETTINGS_BYTES:
        raise ModelError(f"{file}: has {file.stat().st_size:,} bytes; the settings of an adapter have some thousand")
    settings = read_object(file, "settings")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{folder}: has no {WEIGHTS}; other weight files are not read, since loading them can run code"
        )
    if problems := [*_odd_numbers(settings, _largest_size(folder / WEIGHTS)), *_odd_names(settings)]:
        raise ModelError.of([f"{file}: {problem}" for problem in problems])
    return settings


def read_object(file: Path, called: str) -> dict[str, Any]:
    """A JSON file that holds an object, called so in the error.

    Raises:
        ModelError: it is no JSON, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: is no JSON that can be read: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: holds no {called} but {type(found).__name__}")
    return found


def _odd_numbers(settings: Mapping[str, Any], largest: int) -> Iterable[str]:
    """Ranks and scales that are none; a rank beyond the weights would fill the memory before it is found wrong."""
    ranks = {"r": settings.get("r"), **_named(settings, "rank_pattern")}
    alphas = {"lora_alpha": settings.get("lora_alpha"), **_named(settings, "alpha_pattern")}
    for name, rank in ranks.items():
        if rank is not None and (type(rank) is not int or not 0 < rank <= max(largest, 1)):
            yield f"{name} is {rank!r}; a rank is a whole number up to {largest:,}, the largest size in {WEIGHTS}"
    for name, alpha in alphas.items():
        if alpha is not None and (type(alpha) not in (int, float) or not 0 < alpha < math.inf):
            yield f"{name} is {alpha!r}; alpha is a number above 0"


def _named(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = settings.get(name) or {}
    return {f"{name}.{key}": value for key, value in found.items()} if isinstance(found, dict) else {name: found}


def _odd_names(settings: Mapping[str, Any]) -> Iterable[str]:
    base = settings.get("base_model_name_or_path")
    if base is not None and (not isinstance(base, str) or re.match(r"\w+://", base) or "\0" in base):
        yield f"base_model_name_or_path is {base!r}; a base is a folder or a hub name"
    mapping = settings.get("auto_mapping") or {}
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library is not None and not re.fullmatch(r"transformers(\.\w+)*", str(library)):
        yield f"auto_mapping has PEFT import {library!r}; the models of an adapter come from transformers"
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind != "LORA":
        yield f"peft_type is {kind!r}: an adapter of the kind {kind}; LoRA and its variants are read here"
    if task not in (None, "CAUSAL_LM"):
        yield f"task_type is {task!r}; adapters of causal language models are read here"
    if settings.get("megatron_config"):
        yield f"megatron_config has PEFT import {settings.get('megatron_core')!r}; nothing is imported for an adapter"
    if _largest_number(settings.get("layer_replication")) > MOST_LAYERS:
        yield f"layer_replication names a layer beyond {MOST_LAYERS:,}"
    if _largest_number(settings.get("trainable_token_indices")) > MOST_TOKENS:
        yield f"trainable_token_indices names a token beyond {MOST_TOKENS:,}"


def _largest_number(value: Any) -> float:
    """Of all that stands in a value; 0 if there is none."""
    if isinstance(value, (int, float)):
        return abs(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max(map(_largest_number, parts), default=0)


def _largest_size(file: Path) -> int:
    """The largest number of rows or columns of a tensor.

    Raises:
        ModelError: no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return max((size for key in opened.keys() for size in opened.get_slice(key).get_shape()), default=0)  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: is no safetensors file that can be read: {error}") from None


def refuse_slow_patterns(settings: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Tries every pattern of an adapter's settings on every name of the base, in a process that can be ended.

    Python's `re` takes ages for a pattern such as `(a+)+$`, and nothing in this process could stop it.

    Raises:
        ModelError: a pattern is no regex, or they take too long.
    """
    patterns = list(dict.fromkeys(_patterns(settings)))
    for pattern in patterns:
        try:
            if len(pattern) > 2000:
                raise ModelError(f"{where}: a pattern of {len(pattern):,} characters; names or a short regex will do")
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ModelError(f"{where}: {pattern[:80]} is no regex: {error}") from None
    patterns = [
        pattern for pattern in patterns if re.search(r"[*+?{]|\\\d|\(\?", pattern)
    ]  # else there is no going back
    if not patterns:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", MATCH],
            input=json.dumps([patterns, list(names)]).encode(),
            timeout=SECONDS,
            capture_output=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"{where}: matching {', '.join(pattern[:80] for pattern in patterns)} with the names of the model takes "
            f"more than {SECONDS:g} s; name the modules, or write a simpler regex"
        ) from None


def _patterns(settings: Mapping[str, Any]) -> Iterable[str]:
    """Whatever PEFT takes for a regex."""
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        found = settings.get(name)
        if isinstance(found, str) and found != "all-linear":
            yield found
        elif isinstance(found, (list, tuple, set)) and name in ("layers_pattern", "modules_to_save"):
            yield from (str(one) for one in found)
    for name in ("rank_pattern", "alpha_pattern"):
        yield from (settings.get(name) or {})


def refuse_odd_weights(folder: Path) -> None:
    """Raises ModelError if a number in the adapter is NaN or infinite: every word of such a model would be noise."""
    import torch
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                raise ModelError(
                    f"{folder / WEIGHTS}: {key} holds NaN or infinity; the training that made it broke down"
                )


# --- what the run recorded ------------------------------------------------------------------------------


def hash_of_settings(folder: Path) -> str:
    """A hash of what `adapter_config.json` says of what the adapter does; the name of its base is no part of it."""
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if name not in NO_MATTER}
    for name, value in kept.items():
        kept[name] = sorted(value, key=str) if isinstance(value, list) and name == "target_modules" else value
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def base_record(spec: BaseSpec) -> str | None:
    """The fingerprint of the base for the manifest; None of a model that was given loaded and lies nowhere."""
    try:
        return fingerprint_of(spec)
    except ModelError:
        return None


def wrong_parts(folder: Path, manifest: Mapping[str, Any], spec: BaseSpec) -> list[str]:
    """What is not as the run that made the adapter left it; nothing where it was made elsewhere.

    Args:
        manifest: of the adapter.
        spec: the base that it is about to be put on; of a hub model, it must be in the cache.
    """
    wrong = []
    weights = hash_of_file(folder / WEIGHTS)
    if manifest.get("adapter_settings_sha256", now := hash_of_settings(folder)) != now:
        wrong.append(f"{folder / CONFIG}: was changed after the training: alpha, ranks or targets are not its own")
    if manifest.get("adapter_sha256", weights) != weights:
        wrong.append(f"{folder / WEIGHTS}: is not the file that the training wrote")
    base = manifest.get("base") or {}
    then, there = base.get("fingerprint"), base_record(spec)
    is_not_here_yet = there is None and spec.name == base.get("name")
    if then and then != there and not is_not_here_yet:
        what = "is another model than the one that" if there else "has no files here to tell whether it is what"
        wrong.append(f"base {spec.name}: {what} the adapter was trained on")
    if _is_merged_into(spec, weights):
        wrong.append(f"base {spec.name}: this adapter is merged into it already ({MERGE_RECORD} names it)")
    return wrong


def _is_merged_into(spec: BaseSpec, weights_sha256: str) -> bool:
    file = Path(spec.name).expanduser() / MERGE_RECORD
    try:
        adapters = json.loads(file.read_text(encoding="utf-8"))["adapters"] if file.is_file() else []
        return any(one.get("sha256") == weights_sha256 for one in adapters)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
