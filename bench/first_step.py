"""From the start of a process to its first training step: plain TRL, as an expert writes it, beside ours.

`python -m bench.first_step [ROUNDS]` makes a model (width 512, 8 layers, vocabulary 32,000) and rows in a temporary
folder, and starts a fresh process for each side, in turn, round by round: QLoRA in bfloat16, the same rows in the same
order. It prints CPU seconds and wall-clock seconds until the first step begins and until it has ended, and where ours
go. Nothing is prepared or cached from an earlier round.
"""

import importlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
VOCABULARY = 32_000
ROWS = 1000
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}

SAME: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-4,
    "warmup_steps": 0,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
    "bf16": True,
    "seed": 0,
}
"""Settings that both know by one name."""

PARTS = {
    "imports": None,  # measured by the importing itself
    "settings": "lora_sft.api._settings",
    "tokenizer and template": "lora_sft.training.job.load_speech",
    "model without weights": "lora_sft.training.job.skeleton",
    "adapter, rehearsed": "lora_sft.training.job._rehearse",
    "preparation": "lora_sft.training.job.read_data",
    "trainer's arguments": "lora_sft.training.job.training_arguments",
    "what is told": "lora_sft.api.data_view",
    "hashing": "lora_sft.training.run.record_of",
    "loading": "lora_sft.training.run.load_base",
    "adapter": "lora_sft.training.run.build_model",
    "proofs": "lora_sft.training.run.choose_batching",
    "trainer": "lora_sft.training.run.build_trainer",
    "preflight": "lora_sft.api.preflight",
    "guarding": "lora_sft.training.watch.Watch.on_train_begin",
}
"""Where ours go: name → the function that is timed, without what others of them take inside it."""


# --- what each process does -------------------------------------------------------------------------------


def trl_of_messages(folder: Path) -> None:
    """TRL renders and tokenizes the conversations, and masks what the assistant has not said."""
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "cache"))
    _trl(folder, rows, assistant_only_loss=True)


def trl_of_tokens(folder: Path) -> None:
    """TRL is given tokens and labels."""
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(folder / "tokens.jsonl"), split="train", cache_dir=str(folder / "cache"))
    _trl(folder, rows, dataset_kwargs={"skip_prepare_dataset": True})


def _trl(folder: Path, rows: Any, **options: Any) -> None:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    arguments = SFTConfig(
        str(folder / "out"), use_cpu=True, report_to=[], max_length=2048, disable_tqdm=True, **SAME, **options
    )
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=adapter).train()


OURS: dict[str, Any] = {"lora_r": 16, "lora_alpha": 32, "max_length": 2048, "device": "cpu", **SAME}


def ours_of_messages(folder: Path) -> None:
    """`finetune` in Python."""
    from lora_sft import finetune

    finetune(folder / "base", folder / "rows.jsonl", output_dir=folder / "out", **OURS)


def ours_of_tokens(folder: Path) -> None:
    """The same of tokens and labels."""
    from lora_sft import finetune

    finetune(folder / "base", folder / "tokens.jsonl", output_dir=folder / "out", layout="tokens", **OURS)


def ours_on_the_command_line(folder: Path) -> None:
    """`lora-sft train`."""
    from lora_sft.cli import main

    given = {"model": folder / "base", "dataset": folder / "rows.jsonl", "output_dir": folder / "out", **OURS}
    words = (f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items())
    main(["train", *words])


SIDES: dict[str, Callable[[Path], None]] = {
    "TRL, messages": trl_of_messages,
    "ours, messages": ours_of_messages,
    "lora-sft train, messages": ours_on_the_command_line,
    "TRL, tokens": trl_of_tokens,
    "ours, tokens": ours_of_tokens,
}
RIVAL = {
    "ours, messages": "TRL, messages",
    "lora-sft train, messages": "TRL, messages",
    "ours, tokens": "TRL, tokens",
}
KEYS = {
    "begin_cpu": "CPU seconds to the first step",
    "end_cpu": "CPU seconds to its end",
    "begin_wall": "seconds to the first step",
    "end_wall": "seconds to its end",
}


def clocked(side: str, folder: Path, begun: float, with_parts: bool) -> None:
    """Runs a side up to the log line of its first step, prints what the clocks said, and ends the process there.

    Args:
        begun: when the process was started, as `time.time` tells it.
        with_parts: whether to time each of `PARTS` too.
    """
    found: dict[str, Any] = {}

    def stamp(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def stamped(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            found[f"{name}_cpu"], found[f"{name}_wall"] = time.process_time(), time.time() - begun
            return result

        return stamped

    def logged(handler: Any, args: Any, state: Any, control: Any, logs: dict[str, float]) -> None:
        print(json.dumps({**found, "loss": float(logs["loss"])}), flush=True)
        os._exit(0)

    def set_clocks(callbacks: ModuleType) -> None:
        handler = callbacks.CallbackHandler
        handler.on_step_begin = stamp("begin", handler.on_step_begin)
        handler.on_step_end = stamp("end", handler.on_step_end)
        handler.on_log = logged

    when_imported("transformers.trainer_callback", set_clocks)
    if with_parts:
        found["parts"] = timed_parts()
    SIDES[side](folder)


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Has `act` change a module when a side imports it: what each imports first, and how, is part of the race."""

    class Finder(MetaPathFinder):
        def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
            if fullname != name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(fullname)
            assert spec is not None
            assert spec.loader is not None
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                act(module)

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Finder())


@contextmanager
def _taking(name: str, parts: dict[str, float], running: list[str]) -> Iterator[None]:
    """Adds the CPU seconds of a block to its part, and takes them from the part in which it runs."""
    clock = time.process_time()
    running.append(name)
    try:
        yield
    finally:
        running.pop()
        seconds = time.process_time() - clock
        parts[name] = parts.get(name, 0.0) + seconds
        if running:
            parts[running[-1]] = parts.get(running[-1], 0.0) - seconds


def timed_parts() -> dict[str, float]:
    """Imports ours and has each of `PARTS` timed → CPU seconds of each, filled while a run goes on."""
    parts = {"interpreter": time.process_time()}
    running: list[str] = []

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def taking(*args: Any, **kwargs: Any) -> Any:
            with _taking(name, parts, running):
                return call(*args, **kwargs)

        return taking

    import lora_sft

    with _taking("imports", parts, running):
        _ = lora_sft.finetune  # imported as `from lora_sft import finetune` does
    for name, place in PARTS.items():
        if place is not None:
            home, _, attribute = place.rpartition(".")
            owner: Any = importlib.import_module(home) if home in sys.modules else None
            if owner is None:  # of a class
                module, _, kind = home.rpartition(".")
                owner = getattr(importlib.import_module(module), kind)
            setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    return parts


# --- the comparison ---------------------------------------------------------------------------------------


def write_material(folder: Path) -> None:
    """`base/`, a random model with a tokenizer; `rows.jsonl`, conversations; `tokens.jsonl`, the same as tokens."""
    import torch

    from lora_sft import encode
    from lora_sft.model.tiny import tiny_model, tiny_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdfglmnprst", k=draw.randint(2, 9))) for _ in range(4000)]

    def say(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    talks = [
        [{"role": "user", "content": say(5, 40)}, {"role": "assistant", "content": say(5, 120)}] for _ in range(ROWS)
    ]
    tokenizer = tiny_tokenizer((one["content"] for talk in talks for one in talk), 8000)
    tiny_model(VOCABULARY, **SHAPE).to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    with (folder / "rows.jsonl").open("w") as rows, (folder / "tokens.jsonl").open("w") as tokens:
        for talk in talks:
            example = encode(talk, tokenizer)
            rows.write(json.dumps({"messages": talk}) + "\n")
            tokens.write(json.dumps({"input_ids": example.input_ids, "labels": example.labels}) + "\n")


def run(side: str, folder: Path, with_parts: bool = False) -> dict[str, Any]:
    """One side in a process of its own → what `clocked` printed."""
    for made in ("cache", "out"):
        subprocess.run(["rm", "-rf", str(folder / made)], check=True)
    words = [sys.executable, "-m", "bench.first_step", "--side", side, str(folder), str(time.time()), str(with_parts)]
    caches = {"LORA_SFT_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **ONE_THREAD, **QUIET, **caches})
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(rounds: int = 5) -> None:
    """Prints the seconds of each side, the ratios, where ours go, and the whole as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_material(folder)
        taken: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                taken[side].append(run(side, folder))
        parts = run("ours, messages", folder, with_parts=True)
    losses = {side: runs[0]["loss"] for side, runs in taken.items()}
    assert max(losses.values()) - min(losses.values()) < 5e-3, f"not the same training: {losses}"
    median = {side: {key: statistics.median(one[key] for one in runs) for key in KEYS} for side, runs in taken.items()}
    for side, seconds in median.items():
        print(f"{side}: " + ", ".join(f"{seconds[key]:.1f} {words}" for key, words in KEYS.items()))
    ratios = {}
    for side, rival in RIVAL.items():
        ratios[side] = {key: round(median[side][key] / median[rival][key], 2) for key in KEYS}
        verdict = "within" if max(ratios[side].values()) <= 1 else "above"
        print(f"{side} over {rival}: " + ", ".join(map(str, ratios[side].values())) + f"; {verdict} 1")
    where = parts["parts"] | {"first step": parts["end_cpu"] - parts["begin_cpu"]}
    where["the rest"] = parts["end_cpu"] - sum(where.values())
    print("ours, CPU seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in where.items()))
    print(json.dumps({"median": median, "ratios": ratios, "losses": losses, "where": where}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side, place, begun, with_parts = sys.argv[2:]
        clocked(side, Path(place), float(begun), with_parts == "True")
    else:
        main(*map(int, sys.argv[1:]))
