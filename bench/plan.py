"""What a plan costs, and how far its seconds are off on this machine: `python -m bench.plan`.

Three plans of an 8B model from its configuration alone, each in a process of its own; then steps of a small model that
are really taken, against the seconds that the roofline foretells for them.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EIGHT_B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
ASKED = {
    "QLoRA, 2 × 2,048 tokens": [],
    "the same, all layers recomputed": ["--gradient-checkpointing", "true"],
    "settings chosen (auto)": ["--auto"],
    "a table of 4 sizes × 6 lengths": ["--table"],
}
SMALL = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def main() -> None:
    """Prints the tables."""
    with tempfile.TemporaryDirectory() as folder:
        model = _configuration(Path(folder) / "8b", EIGHT_B)
        print(f"{'an 8B model, for an rtx4090':36}{'s':>8}{'MiB of memory':>16}{'GiB foretold':>14}")
        for name, words in ASKED.items():
            seconds, megabytes, found = _plan(["--model", str(model), *_on_card(words), *words])
            peak = f"{found['needed_bytes'] / 2**30:.2f}" if "needed_bytes" in found and "--table" not in words else ""
            print(f"{name:36}{seconds:8.1f}{megabytes:16.0f}{peak:>14}")
    _seconds_here()


def _on_card(words: list[str]) -> list[str]:
    return [] if "--table" in words else ["--gpu", "rtx4090"]


def _configuration(folder: Path, fields: dict[str, int]) -> Path:
    from transformers import LlamaConfig

    LlamaConfig(**fields, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def _plan(words: list[str]) -> tuple[float, float, dict]:
    """Wall seconds and peak memory of the whole command, and what it prints."""
    start = time.perf_counter()
    code = "import sys; from lora_sft.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", *words, "--json"], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    # Of all children so far; they are started from small to large.
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, json.loads(done.stdout)


def _seconds_here() -> None:
    """Real steps over foretold ones, for some shapes of work."""
    import warnings

    warnings.simplefilter("ignore")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_sft import RunConfig
    from lora_sft.planning.calibration import calibrate
    from lora_sft.planning.devices import find_device
    from lora_sft.planning.subject import blueprint_of
    from lora_sft.planning.workload import Workload

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])).save_pretrained(folder)
        device = find_device()
        print(f"\n{'steps here, ' + device.name:52}{'real / foretold':>16}")
        for name, lengths, settings in (
            ("NF4, bfloat16, 8 rows of 200", [200] * 8, {"bf16": True}),
            ("NF4, bfloat16, 2 rows of 1,000", [1000] * 2, {"bf16": True}),
            ("NF4, bfloat16, recomputed", [200] * 8, {"bf16": True, "gradient_checkpointing": True}),
            ("float32, 8 rows of 200", [200] * 8, {"load_in_4bit": False}),
        ):
            config = RunConfig(model_name_or_path=folder, per_device_train_batch_size=len(lengths), **settings)
            ratio = calibrate(blueprint_of(config, device), Workload.of_lengths(lengths, 2048), device)
            print(f"{name:52}{ratio:16.2f}")


if __name__ == "__main__":
    main()
