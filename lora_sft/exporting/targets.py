"""The name of a target → the Target. To add one: a file that defines it, and its line in this table."""

import importlib
from collections.abc import Iterable

from lora_sft.errors import SettingError
from lora_sft.exporting.target import Target

# Files are imported when their target is asked for: most of them import torch.
TARGETS = {
    "gguf": "gguf.GGUF",
    "gguf-adapter": "gguf.GGUF_ADAPTER",
    "ollama": "ollama.OLLAMA",
    "vllm": "vllm.VLLM",
    "adapter": "normal_form.ADAPTER",
    "mlx": "mlx.MLX",
    "mlx-adapter": "mlx.MLX_ADAPTER",
    "hub": "hub.HUB",
}
"""{name on the command line: file in this folder, and the name in it}, in the order in which they are listed."""


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        SettingError: there is none.
    """
    refuse_unknown([name])
    file, _, value = TARGETS[name].partition(".")
    target: Target = getattr(importlib.import_module(f"{__package__}.{file}"), value)
    return target


def refuse_unknown(names: Iterable[str]) -> None:
    """Raises SettingError for names that are no target, with the nearest one that is; imports nothing."""
    problems = [f'"{name}" is no target{nearest(name, TARGETS)}' for name in names if name not in TARGETS]
    if problems:
        raise SettingError.of(problems)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean gguf? Known: gguf, …`, to end a sentence about a name that is unknown."""
    import difflib

    names = list(known)
    found = difflib.get_close_matches(name, names, n=1)
    return (f"; did you mean {found[0]}? K" if found else "; k") + f"nown: {', '.join(names) or 'none'}"
