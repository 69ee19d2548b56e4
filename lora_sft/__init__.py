"""lora_sft: LoRA and QLoRA fine-tuning whose promises are proven on your own model.

    from lora_sft import finetune

    run = finetune("path/or/hub-name", "conversations.jsonl", output_dir="runs/first")
    print(run.chat("hello"))
    run.merge("merged/")

The names below are loaded at first use, so that importing the package costs nothing.
"""

import gc
import importlib
import os
from typing import TYPE_CHECKING, Any

# No telemetry unless the user turns it on. Read by huggingface_hub when it is first imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from lora_sft.api import Chat, Run, evaluate, export, finetune, load, plan, preview, validate
    from lora_sft.chat.labels import Example, Preview, encode
    from lora_sft.chat.rendering import Rendered, render
    from lora_sft.config import RunConfig
    from lora_sft.errors import LoraSftError
    from lora_sft.merging.merge import merge
    from lora_sft.planning.plan import Plan

__version__ = "0.1.0"

_HOME = {
    "Chat": "api",
    "Preview": "chat.labels",
    "Run": "api",
    "evaluate": "api",
    "export": "api",
    "finetune": "api",
    "load": "api",
    "plan": "api",
    "Plan": "planning.plan",
    "merge": "merging.merge",
    "preview": "api",
    "validate": "api",
    "Example": "chat.labels",
    "encode": "chat.labels",
    "Rendered": "chat.rendering",
    "render": "chat.rendering",
    "RunConfig": "config",
    "LoraSftError": "errors",
}

__all__ = [
    "Chat",
    "Example",
    "LoraSftError",
    "Plan",
    "Preview",
    "Rendered",
    "Run",
    "RunConfig",
    "encode",
    "evaluate",
    "export",
    "finetune",
    "load",
    "merge",
    "plan",
    "preview",
    "render",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora_sft' has no attribute {name!r}")
    collects = gc.isenabled()
    gc.disable()  # what is imported stays, and looking through it for garbage takes a quarter of the time
    try:
        return getattr(importlib.import_module(f"lora_sft.{_HOME[name]}"), name)
    finally:
        if collects:
            gc.enable()


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
