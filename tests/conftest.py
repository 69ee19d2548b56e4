"""Tiny random models and conversations that every test may use; no network."""

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: on a busy machine two threads wait longer than they compute
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TQDM_DISABLE"] = "1"

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lora_sft.data.formats import to_conversations
from lora_sft.data.sources import read_rows
from lora_sft.model.tiny import save_tiny, tiny_tokenizer
from lora_sft.resources import shipped

# Two threads that ask a fork for torch's pool at once break it (pytorch 2.13, pthreadpool-cpp.cc: it is made anew at
# the first question, without a lock); so the fork asks alone, before it starts any.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))

# The same examples every time: what passes here passes in CI. HYPOTHESIS_SEARCH=1 looks for new ones.
settings.register_profile("same every time", derandomize="HYPOTHESIS_SEARCH" not in os.environ, database=None)
settings.load_profile("same every time")

HARBOUR = shipped("examples") / "harbour.jsonl"


def conversation(*turns: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]


def sums(count: int) -> list[dict]:
    """Conversations whose replies are of very different lengths."""
    return [
        {"messages": conversation(f"what is {n} plus {n}?", f"it is {2 * n}. " + "so it is. " * (n * n % 11))}
        for n in range(count)
    ]


def logged(folder: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def harbour_texts() -> list[str]:
    return [message["content"] for row in to_conversations(read_rows(HARBOUR)) for message in row.messages]


@pytest.fixture
def tokenizer(harbour_texts):
    return tiny_tokenizer(harbour_texts, 512)


@pytest.fixture(scope="session")
def base(tmp_path_factory, harbour_texts) -> Path:
    """A folder with a tiny Llama-shaped model in float32 and its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("base"), harbour_texts, initializer_range=0.08)


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory, harbour_texts) -> Path:
    """The same, with one matrix for embeddings and head."""
    return save_tiny(tmp_path_factory.mktemp("tied"), harbour_texts, initializer_range=0.08, tie_word_embeddings=True)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def with_a_cache_of_its_own(tmp_path_factory):
    os.environ["LORA_SFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


FEW = {
    "max_steps": 3,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "lora_r": 8,
    "save_strategy": "no",
    "listeners": (),
}
"""Settings of a run that takes a second."""
