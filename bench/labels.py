"""How fast conversations become tokens and labels, beside TRL's own preparation of the same rows.

`python -m bench.labels [ROUNDS]` runs both sides in turn, round by round, in one process on one thread, and prints
ratios of medians. The rows are three turns long under our Llama 3 template; TRL makes its assistant mask from the
template's `{% generation %}` marks. Before the clock starts both sides must have made the same tokens and labels.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1")

ROWS = 1500
TURNS = (3, 12, 48)


def sentences() -> list[str]:
    """Our own example's sentences."""
    from lora_sft.data.formats import to_conversations
    from lora_sft.data.sources import read_rows
    from lora_sft.resources import shipped

    rows = to_conversations(read_rows(shipped("examples") / "harbour.jsonl"))
    return [message["content"] for row in rows for message in row.messages]


def talk(texts: list[str], turns: int, draw: random.Random) -> list[dict[str, str]]:
    """A conversation: questions of about 100 characters, replies of about 300."""

    def say(count: int) -> str:
        return " ".join(draw.choice(texts) for _ in range(count))

    messages = [{"role": "system", "content": say(1)}]
    for _ in range(turns):
        messages += [{"role": "user", "content": say(2)}, {"role": "assistant", "content": say(6)}]
    return messages


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    clock = time.perf_counter()
    work()
    return time.perf_counter() - clock


def main(rounds: int = 5) -> None:
    """Prints the rates and ratios, and the whole as JSON."""
    import datasets
    import torch
    from trl import SFTConfig, SFTTrainer

    from lora_sft.chat.templates import find_template
    from lora_sft.data.conversation import Conversation
    from lora_sft.model.tiny import tiny_model, tiny_tokenizer, tokenizer_for
    from lora_sft.model.tokenizer import Speech
    from lora_sft.preparation.prepare import prepare

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    datasets.disable_caching()
    texts, draw = sentences(), random.Random(0)
    template = find_template("llama3")
    tokenizer = tiny_tokenizer(texts, 8000)
    special = tokenizer_for(template).special_tokens_map
    tokenizer.add_special_tokens({**special, "additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>"]})
    tokenizer.chat_template = template.text
    speech = Speech(tokenizer, ["<|eot_id|>"])
    model = tiny_model(len(tokenizer))

    def trl_rows(rows: list[list[dict[str, str]]], assistant_only: bool) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(
                folder, max_length=100_000, assistant_only_loss=assistant_only, use_cpu=True, report_to=[]
            )
            data = datasets.Dataset.from_list([{"messages": row} for row in rows])
            return SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train_dataset

    def our_rows(rows: list[list[dict[str, str]]], processes: int = 1) -> Any:
        conversations = [Conversation(row, source=str(number)) for number, row in enumerate(rows)]
        return prepare(conversations, speech, max_length=100_000, processes=processes).examples

    rows = [talk(texts, 3, draw) for _ in range(ROWS)]
    for theirs, mine in zip(trl_rows(rows[:50], True), our_rows(rows[:50]), strict=True):
        assert theirs["input_ids"] == mine.input_ids, "the two sides made different tokens"
        assert theirs["labels"] == mine.labels, "the two sides made different labels"

    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: our_rows(rows),
        "TRL with its assistant mask": lambda: trl_rows(rows, True),
        "TRL without a mask": lambda: trl_rows(rows, False),
        "setting TRL's trainer up": lambda: trl_rows(rows[:2], True),
        "ours, 2 processes": lambda: our_rows(rows, 2),
    }
    longer = {turns: [talk(texts, turns, draw) for _ in range(ROWS // turns)] for turns in TURNS}
    sides |= {f"{turns} turns": lambda turns=turns: our_rows(longer[turns]) for turns in TURNS}  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            taken[name].append(seconds(work))
    median = {name: statistics.median(times) for name, times in taken.items()}
    set_up = median.pop("setting TRL's trainer up")
    found: dict[str, Any] = {"conversations_per_second": round(ROWS / median["ours"])}
    print(f"ours: {found['conversations_per_second']} three-turn conversations a second (median of {rounds} rounds)")
    for name in ("TRL with its assistant mask", "TRL without a mask"):
        found[name] = round((median[name] - set_up) / median["ours"], 2)
        print(f"{name}: {found[name]:.2f} times our time, its trainer's set-up taken off")
    found["2 processes"] = round(median["ours"] / median["ours, 2 processes"], 2)
    print(f"2 processes: {found['2 processes']:.2f} times as fast as one")
    per_turn = {turns: median[f"{turns} turns"] / (len(longer[turns]) * turns) for turns in TURNS}
    found["time per turn"] = {turns: round(value / per_turn[TURNS[0]], 2) for turns, value in per_turn.items()}
    print(f"time per turn, against conversations of {TURNS[0]} turns: {found['time per turn']}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
