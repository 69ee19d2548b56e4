"""Conversations on disk → rows of `input_ids` and `labels`, rendered and labelled once, for all sides of the bench."""

import json
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.training import CACHE

Row = tuple[list[int], list[int]]

FILES = {
    "alpaca": ("alpaca_en.json", "chatml"),
    "tools": ("glaive_toolcall_en.json", "qwen2.5"),
    "long": ("alpaca_en.json", "chatml"),
}
"""{workload: (file, chat template)}; `long` joins conversations to documents of `LONG` tokens."""
LONGEST, LONG = 2048, 4096
SAMPLED = 600
"""Conversations made of our own example where the files are not there."""


@dataclass(frozen=True)
class Workload:
    """What is trained on.

    Attributes:
        file: JSON, a list of [input_ids, labels] in the order of training.
        described: where the rows are from, in words.
    """

    file: Path
    described: str

    def rows(self) -> list[Row]:
        """The rows."""
        return [(ids, labels) for ids, labels in json.loads(self.file.read_text())]


def make_rows(data: str, model: Path, data_dir: Path) -> Workload:
    """A workload for the tokenizer of a model, made if it is not there yet.

    Args:
        data: one of `FILES`.
        data_dir: where the files lie; if it is not there, conversations are sampled from `examples/`.
    """
    is_there = data_dir.is_dir()
    file = CACHE / "rows" / f"{data}-{model.name}.json"
    described = (
        FILES[data][0] if is_there else f"{SAMPLED} conversations sampled from examples/ ({data_dir} is not there)"
    )
    if not file.is_file():
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "bench.training.rows",
            data,
            str(model),
            str(data_dir),
            str(file),
        ]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the bench could not make its rows:\n{done.stderr[-2000:]}")
    return Workload(file, described)


def sample_conversations(rows: Sequence[dict[str, Any]], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of 1 to 12 exchanges that are drawn from those given, so that lengths differ as in real ones."""
    draw = random.Random(seed)
    exchanges = [row["messages"] for row in rows]
    return [
        {"messages": [turn for some in draw.choices(exchanges, k=draw.randint(1, 12)) for turn in some]}
        for _ in range(count)
    ]


def join(rows: Iterable[Row], size: int) -> list[Row]:
    """Rows in order → documents of exactly `size` tokens; what is over goes into the next, the last is left out."""
    documents, ids, labels = [], [], []
    for more_ids, more_labels in rows:
        ids, labels = ids + more_ids, labels + more_labels
        while len(ids) >= size:
            documents.append((ids[:size], labels[:size]))
            ids, labels = ids[size:], labels[size:]
    return documents


def conversations_in(data: str, data_dir: Path) -> Any:
    """A path, or conversations sampled from our own example."""
    if data_dir.is_dir():
        return data_dir / FILES[data][0]
    from lora_sft.resources import shipped

    lines = (shipped("examples") / "harbour.jsonl").read_text(encoding="utf-8").splitlines()
    return sample_conversations([json.loads(line) for line in lines], SAMPLED)


def texts_of(data_dir: Path) -> list[str]:
    """Text for a tokenizer to learn from."""
    found = conversations_in("alpaca", data_dir)
    if isinstance(found, Path):
        return [" ".join(row.values()) for row in json.loads(found.read_text(encoding="utf-8"))]
    return [turn["content"] for row in found for turn in row["messages"]]


def render(data: str, model: Path, data_dir: Path) -> list[Row]:
    """Every conversation of at most `LONGEST` tokens as `lora_sft` makes it, shuffled once."""
    from lora_sft import preview

    found = conversations_in(data, data_dir)
    shown = preview(model, found, chat_template=FILES[data][1], max_length=LONGEST)
    rows = [(list(one.example.input_ids), list(one.example.labels)) for one in shown]
    rows = [row for row in rows if len(row[0]) <= LONGEST and any(label >= 0 for label in row[1])]
    random.Random(0).shuffle(rows)
    return join(rows, LONG) if data == "long" else rows


def main(data: str, model: str, data_dir: str, file: str) -> None:
    """Writes the rows; the file appears when it is whole."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(render(data, Path(model), Path(data_dir))))
    part.rename(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
