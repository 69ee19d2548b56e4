"""`lora-sft doctor`: what this machine has, what of it is known not to work, and what is missing for which target."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from lora_sft.cli.known_bad import Gpu, Machine, troubles
from lora_sft.cli.options import json_option, print_json

OPTIONAL = ("gguf", "xllamacpp", "mlx", "mlx-lm", "vllm")
"""Packages that only some targets use, or are checked with."""

KERNELS = {
    "liger-kernel": "our own kernels do; `pip install 'lora_sft[liger]'` has its tried beside them on a GPU",
    "flash-attn": "sdpa is used",
    "triton": "only GPUs use it",
    "causal-conv1d": "models with convolutions (Qwen3-Next, LFM2, …) are not packed",
}
"""{package: what is done without it}."""

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
    """Tell what this machine has: packages, devices, kernels, disk; what of it is known not to work together; and what
    each export target lacks."""
    machine = look()
    checks = [*_python(), *_packages(), *_devices(), *_kernels(machine), *_known_bad(machine), *_targets(), *_disk()]
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
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no GPU is visible to PyTorch"
        status = "missing" if shutil.which("nvidia-smi") else "ok"
        yield Check("device", status, f"cpu, {torch.get_num_threads()} threads ({why})")
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


def _kernels(machine: Machine) -> Iterator[Check]:
    """What computes faster, or is computed with at all."""
    for name, without in KERNELS.items():
        found = machine.versions.get(name)
        yield Check(f"kernel {name}", "ok" if found else "missing", found or f"not installed (optional; {without})")
    able = [gpu.name for gpu in machine.gpus if gpu.capability >= (8, 0)]
    there = _imported("torch.nn.attention.varlen") is not None
    words = "for rows of many lengths, in 16 bits" if there and able else "needs torch 2.10 and a GPU of capability 8.0"
    yield Check("kernel varlen_attn", "ok" if there and able else "missing", f"torch's own; {words}")
    if "bitsandbytes" in machine.versions and not machine.bitsandbytes_error:
        yield Check("kernel bitsandbytes", "ok", _library_of_bitsandbytes())


def _known_bad(machine: Machine) -> Iterator[Check]:
    """What is known not to work together on this machine, what goes wrong, and what to do."""
    for known, found in troubles(machine):
        yield Check(known.topic, known.trouble, f"{found}: {known.wrong}; {known.do}")


def look() -> Machine:
    """This machine, as `KNOWN_BAD` looks at it."""
    from packaging.utils import canonicalize_name

    installed = {canonicalize_name(one.name): one for one in importlib.metadata.distributions() if one.name}
    torch = _imported("torch")
    gpus = _gpus(torch) if torch else []
    shared, kernel = Path("/dev/shm"), platform.release().lower()
    return Machine(
        python=platform.python_version(),
        versions={name: one.version for name, one in installed.items()},
        requires={name: one.requires or [] for name, one in installed.items()},
        torch_cuda=torch.version.cuda if torch else None,
        torch_archs=torch.cuda.get_arch_list() if gpus else [],
        gpus=gpus,
        driver=_driver(),
        environment=dict(os.environ),
        bitsandbytes_error=_error_of_bitsandbytes() if gpus and "bitsandbytes" in installed else "",
        flash_attn_error=_error_of_import("flash_attn") if "flash-attn" in installed else "",
        shared_bytes=shutil.disk_usage(shared).total if shared.is_dir() else None,
        is_wsl=sys.platform == "linux" and "microsoft" in kernel,
    )


def _imported(name: str) -> Any:
    """A module; None if it cannot be imported, which other checks tell."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def _error_of_import(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:  # a library of another torch fails in many ways
        return f"installed, but not to be imported ({str(error).splitlines()[0][:200] if str(error) else type(error)})"
    return ""


def _gpus(torch: Any) -> list[Gpu]:
    try:
        return [
            Gpu(torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number))
            for number in range(torch.cuda.device_count())
        ]
    except RuntimeError:  # told where each device is looked at
        return []


def _driver() -> str | None:
    """The version of NVIDIA's driver; None where none works."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = done.stdout.split()
    return said[0] if done.returncode == 0 and said else None


def _bitsandbytes() -> Any:
    """The module that loads its native library."""
    import lora_sft.model.base  # noqa: F401 - keeps back what it would say of an optional package

    return _imported("bitsandbytes.cextension")


def _error_of_bitsandbytes() -> str:
    """Why its native library could not be loaded; it says so itself only when a layer is computed."""
    found = _bitsandbytes()
    return str(getattr(found.lib, "error_msg", "")) if found else "cannot be imported"


def _library_of_bitsandbytes() -> str:
    """The file of its native library."""
    found = _bitsandbytes()
    library = getattr(vars(found.lib).get("_lib"), "_name", None) if found else None
    return Path(str(library)).name if library else "no native library: 4-bit and 8-bit models run in plain PyTorch"


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
