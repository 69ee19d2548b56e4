"""Rows on disk → tokens and labels ready to train on, beside TRL's own: rows a second and peak memory.

`python -m bench.preparation [ROUNDS] [MOST]` writes conversations to a JSONL file, then runs each side in a process of
its own, in turn, round by round, and prints ratios of medians; afterwards our side alone at 10,000, 100,000 … MOST
rows.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
ROWS = 5000

COMMON = """
import json, resource, sys, time
from pathlib import Path
from lora_sft.chat.templates import find_template
from lora_sft.model.tiny import tiny_model, tiny_tokenizer
folder = Path(sys.argv[1])
texts = [m["content"] for line in open(folder / "few.jsonl") for m in json.loads(line)["messages"]]
tokenizer = tiny_tokenizer(texts, 4000)
model = tiny_model(len(tokenizer))
import trl, torch, datasets
torch.set_num_threads(1)
datasets.disable_progress_bars()
before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
"""
OURS = """
from lora_sft.model.tokenizer import Speech
from lora_sft.settings import resolve
from lora_sft.preparation.dataset import read_data
config = resolve({"dataset": str(folder / "rows.jsonl"), "data_cache": str(folder / "cache"), "max_length": 100000})
examples = read_data(config, Speech(tokenizer, ["<|im_end|>"])).train.examples
count = len(examples)
"""
TRL = """
data = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "hf"))
arguments = trl.SFTConfig(str(folder / "out"), max_length=100000, assistant_only_loss=True, use_cpu=True, report_to=[])
count = len(trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train_dataset)
"""
END = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"rows": count, "seconds": time.perf_counter() - clock, "more_kib": peak - before, "peak_kib": peak}))
"""


def write_rows(path: Path, count: int, draw: random.Random) -> None:
    """Short conversations of one turn."""
    words = [
        "tide",
        "boat",
        "harbour",
        "lantern",
        "gull",
        "rope",
        "keeper",
        "night",
        "storm",
        "quay",
        "pilot",
        "anchor",
    ]

    def say(number: int) -> str:
        return " ".join(draw.choice(words) for _ in range(number))

    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            talk = [{"role": "user", "content": say(8)}, {"role": "assistant", "content": say(16)}]
            stream.write(json.dumps({"messages": talk}) + "\n")


def run(side: str, folder: Path) -> dict[str, float]:
    """One side in a process of its own → {"rows", "seconds", "more_kib" of memory than before, "peak_kib"}."""
    for cache in ("cache", "hf"):
        subprocess.run(["rm", "-rf", str(folder / cache)], check=True)
    words = [sys.executable, "-W", "ignore", "-c", COMMON + side + END, str(folder)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(rounds: int = 3, most: int = 100_000) -> None:
    """Prints the rates and ratios, and the whole as JSON."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "few.jsonl", 200, draw)
        write_rows(folder / "rows.jsonl", ROWS, draw)
        taken: dict[str, list[dict[str, float]]] = {"ours": [], "TRL": []}
        for _ in range(rounds):
            for name_of_side, side in (("ours", OURS), ("TRL", TRL)):
                taken[name_of_side].append(run(side, folder))
        assert {run["rows"] for runs in taken.values() for run in runs} == {ROWS}
        median = {
            (side, key): statistics.median(run[key] for run in runs)
            for side, runs in taken.items()
            for key in ("seconds", "more_kib", "peak_kib")
        }
        speed = median["TRL", "seconds"] / median["ours", "seconds"]
        memory = median["ours", "more_kib"] / median["TRL", "more_kib"]
        print(f"{ROWS:,} rows: ours {ROWS / median['ours', 'seconds']:,.0f} rows a second, {speed:.2f} times TRL's")
        print(f"memory taken beyond the imports: ours over TRL's {memory:.2f}")
        curve = {}
        count = 10_000
        while count <= most:
            write_rows(folder / "rows.jsonl", count, draw)
            found = run(OURS, folder)
            curve[count] = {"seconds": round(found["seconds"], 1), "more_mib": round(found["more_kib"] / 1024)}
            print(
                f"ours, {count:,} rows: {found['seconds']:.1f} s, {found['more_kib'] / 1024:.0f} MiB more than before"
            )
            count *= 10
        print(json.dumps({"speed": round(speed, 2), "memory": round(memory, 2), "curve": curve}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
