"""What is installed and what machine it is → the known bad combinations among it, each with what to do.

To add one: a line in `KNOWN_BAD`. Each says where it is known from.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Trouble = Literal["bad", "missing"]

NEEDED_DRIVER = {"11": 450, "12": 525, "13": 580}
"""{CUDA of the PyTorch build: first driver that runs it}; NVIDIA, CUDA Compatibility, table 1."""

LITTLE_SHARED_BYTES = 2**30
"""Of `/dev/shm`; a container has 64 MiB unless it is told otherwise."""

DIRECT = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "huggingface-hub")
"""Packages whose own requirements are looked at."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as PyTorch sees it; of an RTX 4090 the capability is (8, 9)."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]})"


@dataclass(frozen=True)
class Machine:
    """All that `KNOWN_BAD` looks at.

    Attributes:
        python: its version.
        versions: {distribution: version} of what is installed, each by its canonical name (`flash-attn`).
        requires: {distribution: its requirements} of the same.
        torch_cuda: CUDA of the PyTorch build; None for one without.
        torch_archs: for what it was compiled: `sm_90`, `compute_90`.
        gpus: that PyTorch sees.
        driver: version of NVIDIA's; None if there is none.
        environment: variables.
        bitsandbytes_error: why its library for this GPU could not be loaded; on the CPU it does without.
        flash_attn_error: why flash-attn, which is installed, cannot be imported.
        shared_bytes: size of `/dev/shm`; None where there is none.
        is_wsl: whether it is Linux inside Windows.
    """

    python: str = "3.12.0"
    versions: Mapping[str, str] = field(default_factory=dict)
    requires: Mapping[str, Sequence[str]] = field(default_factory=dict)
    torch_cuda: str | None = None
    torch_archs: Sequence[str] = ()
    gpus: Sequence[Gpu] = ()
    driver: str | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    bitsandbytes_error: str = ""
    flash_attn_error: str = ""
    shared_bytes: int | None = None
    is_wsl: bool = False

    def has(self, distribution: str, versions: str = "") -> bool:
        """Whether it is installed, in one of these versions: `<0.16`."""
        from packaging.specifiers import SpecifierSet

        found = self.versions.get(distribution)
        return found is not None and SpecifierSet(versions).contains(found, prereleases=True)


@dataclass(frozen=True)
class KnownBad:
    """A combination that is known not to work.

    Attributes:
        topic: what it is about.
        found: a machine → what of it is bad, in words; empty if nothing is.
        wrong: what happens then.
        do: what to do about it.
        source: where it is known from.
        trouble: `bad` if something fails, `missing` if not everybody meets it.
    """

    topic: str
    found: Callable[[Machine], str]
    wrong: str
    do: str
    source: str
    trouble: Trouble = "bad"


def troubles(machine: Machine) -> Iterator[tuple[KnownBad, str]]:
    """Every entry that applies, and what was found."""
    for known in KNOWN_BAD:
        if words := known.found(machine):
            yield known, words


def _unmet(machine: Machine) -> str:
    """Requirements of the packages that we use, which what is installed does not meet."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    unmet = []
    for name in DIRECT:
        for requirement in map(Requirement, machine.requires.get(name, ())):
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            there = machine.versions.get(canonicalize_name(requirement.name))
            if needed and there and not requirement.specifier.contains(there, prereleases=True):
                unmet.append(f"{name} {machine.versions.get(name)} needs {requirement}, and {there} is installed")
    return "; ".join(unmet)


def _built_for_another_torch(machine: Machine) -> str:
    from packaging.requirements import Requirement

    torch, found = machine.versions.get("torch"), []
    for name in ("torchvision", "torchaudio"):
        wanted = next((one for one in map(Requirement, machine.requires.get(name, ())) if one.name == "torch"), None)
        if torch and wanted and not wanted.specifier.contains(torch, prereleases=True):
            found.append(f"{name} {machine.versions.get(name)} is built for {wanted}, and {torch} is installed")
    return "; ".join(found)


def _old_driver(machine: Machine) -> str:
    needed = NEEDED_DRIVER.get((machine.torch_cuda or "").partition(".")[0])
    there = re.match(r"\d+", machine.driver or "")
    if needed is None or there is None or int(there.group()) >= needed:
        return ""
    return f"NVIDIA driver {machine.driver}, and PyTorch for CUDA {machine.torch_cuda} needs {needed} or newer"


def _without_cuda(machine: Machine) -> str:
    return "an NVIDIA driver beside a PyTorch without CUDA" if machine.driver and machine.torch_cuda is None else ""


def _hidden(machine: Machine) -> str:
    value = machine.environment.get("CUDA_VISIBLE_DEVICES")
    hides = value is not None and value.strip() in ("", "-1")
    return f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU" if machine.driver and hides else ""


def _not_compiled_for(machine: Machine) -> str:
    """Code for an architecture runs on those of the same major number; `compute` is compiled further when it runs."""
    numbers = [(kind, int(digits)) for kind, digits in re.findall(r"(sm|compute)_(\d+)", " ".join(machine.torch_archs))]
    missing = []
    for gpu in machine.gpus if numbers else ():
        major, minor = gpu.capability
        runs = any(n // 10 == major if kind == "sm" else n <= 10 * major + minor for kind, n in numbers)
        missing += [] if runs else [str(gpu)]
    return f"{', '.join(missing)}: this PyTorch is compiled for {' '.join(machine.torch_archs)}" if missing else ""


def _several_gpus(machine: Machine) -> str:
    return f"{len(machine.gpus)} GPUs" if len(machine.gpus) > 1 and "LOCAL_RANK" not in machine.environment else ""


def _without_bfloat16(machine: Machine) -> str:
    return ", ".join(str(gpu) for gpu in machine.gpus if gpu.capability < (8, 0))


def _little_shared(machine: Machine) -> str:
    size = machine.shared_bytes
    return f"{size / 2**20:.0f} MiB" if size is not None and size < LITTLE_SHARED_BYTES else ""


def _old_torchao(machine: Machine) -> str:
    bad = machine.has("peft", ">=0.21") and machine.has("torchao", "<0.16")
    return f"torchao {machine.versions.get('torchao')} beside PEFT {machine.versions.get('peft')}" if bad else ""


def _old_gptqmodel(machine: Machine) -> str:
    if not (machine.has("peft", ">=0.21") and machine.has("gptqmodel")):
        return ""
    if machine.has("gptqmodel", ">=7") and machine.has("optimum", ">=1.24"):
        return ""
    optimum = f"optimum {machine.versions['optimum']}" if machine.has("optimum") else "no optimum"
    return f"gptqmodel {machine.versions['gptqmodel']} and {optimum} beside PEFT {machine.versions['peft']}"


KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(
        "requirements",
        _unmet,
        "imports fail, or calls that have changed",
        "`pip install --upgrade lora_sft` into a fresh environment, or install what is named",
        "the metadata of the packages",
    ),
    KnownBad(
        "torchvision",
        _built_for_another_torch,
        "importing it fails (operator torchvision::nms does not exist), and with it what transformers imports",
        "install the one that belongs to this torch, or uninstall it: training needs neither vision nor audio",
        "pytorch/pytorch#122494, meta-llama/llama-cookbook#710",
    ),
    KnownBad(
        "torchao",
        _old_torchao,
        "PEFT raises ImportError when it attaches an adapter to a layer that is not quantized",
        "`pip install 'torchao>=0.16'`, or uninstall it",
        "peft/import_utils.py of PEFT 0.21.2",
    ),
    KnownBad(
        "gptqmodel",
        _old_gptqmodel,
        "PEFT raises ImportError when it attaches an adapter to a layer that is not quantized",
        "`pip install 'gptqmodel>=7' 'optimum>=1.24'`, or uninstall gptqmodel",
        "peft/import_utils.py of PEFT 0.21.2",
    ),
    KnownBad(
        "bitsandbytes",
        lambda machine: machine.bitsandbytes_error,
        "4-bit and 8-bit models fail at their first layer",
        "`python -m bitsandbytes` tells more; install a version that ships a library for this CUDA, unset "
        "BNB_CUDA_VERSION, or train with load_in_4bit: false",
        "bitsandbytes/cextension.py of bitsandbytes 0.50.2",
    ),
    KnownBad(
        "flash-attn",
        lambda machine: machine.flash_attn_error,
        "a model with attn_implementation: flash_attention_2 cannot be loaded",
        "`pip install --force-reinstall --no-build-isolation flash-attn` for this torch; without it sdpa is used",
        "Dao-AILab/flash-attention#931, #1832",
    ),
    KnownBad(
        "PyTorch",
        _without_cuda,
        "training runs on the CPU",
        "install a CUDA build of PyTorch (https://pytorch.org/get-started/locally)",
        "torch.version.cuda",
    ),
    KnownBad(
        "driver",
        _old_driver,
        "PyTorch sees no GPU",
        "install a newer driver, or a PyTorch build for an older CUDA",
        "NVIDIA, CUDA Compatibility, table 1",
    ),
    KnownBad(
        "hidden GPU",
        _hidden,
        "training runs on the CPU",
        "unset CUDA_VISIBLE_DEVICES",
        "CUDA's own variable",
    ),
    KnownBad(
        "GPU architecture",
        _not_compiled_for,
        "kernels fail (no kernel image is available for execution on the device)",
        "install a PyTorch build that names this architecture",
        "_check_cubins in torch/cuda/__init__.py",
    ),
    KnownBad(
        "several GPUs",
        _several_gpus,
        "one process uses the first alone, and TRL takes no DataParallel",
        "`accelerate launch -m lora_sft train …` uses all of them",
        "trl/trainer/sft_trainer.py of TRL 1.16",
        "missing",
    ),
    KnownBad(
        "bfloat16",
        _without_bfloat16,
        "there is no bfloat16: float16 is used, with a scale for the loss; FlashAttention 2 and torch's attention for "
        "rows of many lengths need capability 8.0",
        "nothing: float16 and sdpa are chosen; leave attn_implementation unset",
        "model/device.py, kernels/attention.py; the README of Dao-AILab/flash-attention",
        "missing",
    ),
    KnownBad(
        "/dev/shm",
        _little_shared,
        "processes that load data, and those of several GPUs, die with a bus error",
        "start the container with --shm-size=8g or --ipc=host; without dataloader_num_workers nothing uses it",
        "the README of PyTorch; PrefectHQ/prefect#4773",
        "missing",
    ),
    KnownBad(
        "WSL",
        lambda machine: "Linux inside Windows" if machine.is_wsl and machine.gpus else "",
        "little memory of the host can be pinned: out of memory is told though the GPU has room",
        "leave gradient_checkpointing: offload out, and set training_args: {dataloader_pin_memory: false}",
        "microsoft/WSL#8447",
        "missing",
    ),
    KnownBad(
        "Python 3.10",
        lambda machine: "Python 3.10" if machine.python.startswith("3.10.") else "",
        "transformers 5.20 and TRL 1.14 are the last ones for it, and there is no mlx-lm",
        "use Python 3.11 or newer",
        "constraints.txt; the metadata of transformers 5.23 and TRL 1.16",
        "missing",
    ),
)
