"""`lora-sft doctor`: what this machine has, and what is missing for which target."""

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from lora_sft.cli.options import json_option, print_json

OPTIONAL = ("gguf", "xllamacpp", "mlx", "mlx-lm", "vllm")
"""Packages that only some targets use, or are checked with."""

LITTLE_BYTES = 5 * 2**30

COLOURS = {"ok": "green", "missing": "yellow", "bad": "red"}


@dataclass(frozen=True)
class Check:
    """One line: `ok`, `missing` (something that not everybody needs) or `bad` (something will not work)."""

    topic: str
    status: str
    words: str


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Tell what this machine has: packages, devices, disk, and what each export target lacks."""
    checks = [*_python(), *_packages(), *_devices(), *_targets(), *_disk()]
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
        return
    from rich.text import Text

    from lora_sft.console import console, table_of

    table = table_of("", "", "")
    table.show_header = False
    for check in checks:
        table.add_row(Text(check.status, COLOURS[check.status]), Text(check.topic), Text(check.words))
    console(results=True).print(table)


def _python() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("lora_sft")["Requires-Python"]
    fits = SpecifierSet(wanted).contains(platform.python_version(), prereleases=True)
    words = platform.python_version() if fits else f"{platform.python_version()}, but {wanted} is needed"
    yield Check("python", "ok" if fits else "bad", f"{words} ({sys.executable})")
    yield Check("platform", "ok", platform.platform())


def _packages() -> Iterator[Check]:
    """What lora_sft itself requires, in the versions that it asks for, and what some targets want besides."""
    from packaging.requirements import Requirement

    yield Check("lora_sft", "ok", importlib.metadata.version("lora_sft"))
    for requirement in map(Requirement, importlib.metadata.requires("lora_sft") or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found = _version(requirement.name)
            fits = found is not None and requirement.specifier.contains(found, prereleases=True)
            wanted = f"{found or 'not installed'}; pip install '{requirement}'"
            yield Check(requirement.name, "ok" if fits else "bad", found if fits and found else wanted)
    for name in OPTIONAL:
        found = _version(name)
        yield Check(name, "ok" if found else "missing", found or "not installed (optional; see the targets)")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # a broken installation is what one comes here with
        yield Check("device", "bad", f"torch cannot be imported: {error}")
        return
    for number in range(torch.cuda.device_count()):
        yield _gpu(number)
    if not torch.cuda.is_available():
        unused = shutil.which("nvidia-smi") is not None
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no GPU is visible to PyTorch"
        hint = ", though an NVIDIA driver is installed; install a CUDA build of PyTorch" if unused else ""
        yield Check("device", "missing" if unused else "ok", f"cpu, {torch.get_num_threads()} threads ({why}{hint})")
        if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
            words = "this CPU has it; bitsandbytes would repack 4-bit weights in place, which is switched off here"
            yield Check("AVX512-BF16", "ok", words)


def _gpu(number: int) -> Check:
    import torch

    try:
        with torch.cuda.device(number):
            free, whole = torch.cuda.mem_get_info()
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    except RuntimeError as error:
        return Check(f"cuda:{number}", "bad", f"cannot be used: {str(error).splitlines()[0]}")
    name = torch.cuda.get_device_name(number)
    has = "bfloat16" if bf16 else "no bfloat16 (float16 is used)"
    return Check(f"cuda:{number}", "ok", f"{name}, {_gib(free)} of {_gib(whole)} free, {has}")


def _targets() -> Iterator[Check]:
    """What each target needs; one that cannot be asked, because a package is broken, says so."""
    from lora_sft.exporting.targets import TARGETS, find_target

    for name in TARGETS:
        try:
            lacking = {what: words for what, words in find_target(name).needs().items() if words}
        except Exception as error:  # whatever the import of a broken package may raise
            yield Check(f"export {name}", "bad", f"{type(error).__name__}: {error}")
            continue
        words = "; ".join(f"{what}: {words}" for what, words in lacking.items())
        yield Check(f"export {name}", "missing" if lacking else "ok", words or "nothing is missing")


def _disk() -> Iterator[Check]:
    from huggingface_hub import constants

    from lora_sft.preparation.cache import cache_folder

    for what, folder in (
        ("disk here", Path.cwd()),
        ("disk of models", Path(constants.HF_HUB_CACHE)),
        ("disk of prepared data", cache_folder("auto")),
    ):
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        yield Check(what, "ok" if free > LITTLE_BYTES else "bad", f"{_gib(free)} free ({folder})")


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
