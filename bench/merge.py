"""An adapter and a large base → one model on disk, beside PEFT's own way and a plain copy of the files.

`python -m bench.merge [ROUNDS]` makes random bfloat16 models of 1.5 and 3 GB with an adapter each, runs every side in a
process of its own, in turn, round by round, and prints medians of wall time and of peak memory (the most that was
resident, imports and all). What was written is compared tensor by tensor.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
LAYERS = {"1.5 GB": 10, "3 GB": 22}

MAKE = """
import json, sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
folder, layers, shape = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_hidden_layers=layers), dtype=torch.bfloat16)
model.save_pretrained(folder / "base", max_shard_size="1GB")
model.name_or_path = str(folder / "base")
adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.02)
adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
adapted.save_pretrained(folder / "adapter")
"""
OURS = """
import sys
from lora_sft import merge
merge(sys.argv[1] + "/adapter", sys.argv[1] + "/out", verify="no")
"""
VERIFIED = """
import sys
from lora_sft import merge
merge(sys.argv[1] + "/adapter", sys.argv[1] + "/out", verify="tensors")
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base", dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, sys.argv[1] + "/adapter").merge_and_unload(safe_merge=True)
model.save_pretrained(sys.argv[1] + "/out", max_shard_size="1GB")
"""
COPY = """
import shutil, sys
shutil.copytree(sys.argv[1] + "/base", sys.argv[1] + "/out")
"""
SIDES = {"ours": OURS, "ours, every tensor checked": VERIFIED, "PEFT": PEFT, "copy": COPY}
END = """
import json, resource
print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}))
"""


def run(side: str, folder: Path) -> dict[str, float]:
    """One side in a process of its own → {"seconds" from start to end, "peak_mb"}."""
    subprocess.run(["rm", "-rf", str(folder / "out")], check=True)
    timed = "import time; clock = time.perf_counter()\n" + SIDES[side] + END
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    clock = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", timed, str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    seconds = time.perf_counter() - clock
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def difference(folder: Path) -> dict[str, float]:
    """How far what was written is from the exact sum, in float64, as a share of its length.

    In a process of its own: one that is started from a large one counts as large.
    """
    code = "import sys; from pathlib import Path; from bench.merge import apart; print(apart(Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, stdout=subprocess.PIPE)
    return {"apart": float(done.stdout), "rounding alone": 2.0**-9}


def apart(folder: Path) -> float:
    """The distance itself, over every 17th tensor."""
    from safetensors import safe_open

    def tensors(where: Path) -> dict[str, Any]:
        return {
            name: file
            for path in sorted(where.glob("*.safetensors"))
            for file in [safe_open(path, "pt")]
            for name in list(file.keys())
        }

    base, out, adapter = (tensors(folder / name) for name in ("base", "out", "adapter"))
    squares = total = 0.0
    for name in list(base)[::17]:
        exact = base[name].get_tensor(name).double()
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            a, b = (adapter[f"{key}.lora_{one}.weight"].get_tensor(f"{key}.lora_{one}.weight").double() for one in "AB")
            exact += 2 * (b @ a)
        squares += (out[name].get_tensor(name).double() - exact).square().sum().item()
        total += exact.square().sum().item()
    return float((squares / total) ** 0.5)


def main(rounds: int = 3) -> None:
    """Prints medians and ratios, and the whole as JSON."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for size, layers in LAYERS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            words = [sys.executable, "-W", "ignore", "-c", MAKE, name, str(layers), json.dumps(SHAPE)]
            subprocess.run(words, check=True, capture_output=True)
            taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for _ in range(rounds):
                for side in SIDES:
                    taken[side].append(run(side, folder))
            found[size] = {
                side: {key: round(statistics.median(one[key] for one in runs), 1) for key in ("seconds", "peak_mb")}
                for side, runs in taken.items()
            }
            for side in ("ours", "PEFT"):
                run(side, folder)
                found[size][side] |= difference(folder)
            for side, numbers in found[size].items():
                print(f"{size}, {side}: {numbers}")
            ratio = found[size]["ours"]["seconds"] / found[size]["PEFT"]["seconds"]
            print(f"{size}: ours over PEFT's time {ratio:.2f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
