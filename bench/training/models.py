"""The name of a shape → a folder with a model of random weights in it, and one adapter that every side starts from.

Both are made once, in a process of their own, and kept in a temporary folder for the next bench.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.training import CACHE

LEARNED_TOKENS = 8000
"""Vocabulary of the tokenizer, learned from the data; the model's own is larger, as its head is."""


@dataclass(frozen=True)
class Shape:
    """A model that the bench makes.

    Attributes:
        kind: `llama` or `qwen3`.
        sizes: fields of its configuration in transformers.
        needs_cuda: whether a CPU would take hours for it.
    """

    kind: str
    sizes: Mapping[str, Any]
    needs_cuda: bool = False


def _sizes(
    width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    } | more


SHAPES = {
    "A": Shape("llama", _sizes(512, 1408, 8, 8, 4, 32_000)),
    "B": Shape("qwen3", _sizes(512, 1408, 8, 8, 4, 151_936, head_dim=64, tie_word_embeddings=True)),
    "C": Shape("llama", _sizes(1024, 2816, 12, 16, 8, 32_000)),
    "small": Shape("llama", _sizes(256, 704, 4, 4, 2, 8192)),
    "tiny": Shape("llama", _sizes(64, 128, 2, 4, 2, 8192)),
    "llama-1b": Shape("llama", _sizes(2048, 8192, 16, 32, 8, 128_256, tie_word_embeddings=True), needs_cuda=True),
    "llama-8b": Shape("llama", _sizes(4096, 14_336, 32, 32, 8, 128_256), needs_cuda=True),
    "qwen3-1.7b": Shape(
        "qwen3", _sizes(2048, 6144, 28, 16, 8, 151_936, head_dim=128, tie_word_embeddings=True), needs_cuda=True
    ),
    "qwen3-8b": Shape("qwen3", _sizes(4096, 12_288, 36, 32, 8, 151_936, head_dim=128), needs_cuda=True),
}


def make_model(name: str, data_dir: Path, **other_sizes: Any) -> Path:
    """The folder of a model, made if it is not there yet.

    Args:
        name: of one of `SHAPES`.
        data_dir: where the conversations lie that its tokenizer is learned from.
        other_sizes: instead of those of the shape: `vocab_size=64_000`.
    """
    label = "-".join([name, *(f"{key}={value}" for key, value in sorted(other_sizes.items()))])
    source = "shared" if data_dir.is_dir() else "examples"
    folder = CACHE / f"{label}-{source}"
    if not (folder / "done").is_file():
        _in_a_process("model", name, json.dumps(other_sizes), data_dir, folder)
    return folder


def make_adapter(model: Path, seed: int = 0, rank: int = 16) -> Path:
    """The folder of an adapter as `lora_sft` starts it with this seed: A drawn, B zero. Made if it is not there yet."""
    folder = CACHE / "adapters" / f"{model.name}-seed{seed}-rank{rank}"
    if not (folder / "done").is_file():
        _in_a_process("adapter", model, seed, rank, folder)
    return folder


def _in_a_process(*words: Any) -> None:
    """One of the makers below; the caller stays free of torch."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.training.models", *map(str, words)]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the bench could not make its {words[0]}:\n{done.stderr[-2000:]}")


def write_model(shape: Shape, texts: list[str], folder: Path) -> None:
    """Random weights of the shape and a tokenizer learned from the texts, as `from_pretrained` reads them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from lora_sft.model.tiny import tiny_tokenizer

    kinds: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config_class, model_class = kinds[shape.kind]
    tokens = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = config_class(**shape.sizes, **tokens, max_position_embeddings=8192)
    torch.manual_seed(0)
    if shape.needs_cuda:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = model_class(config).cpu()
    else:
        model = model_class(config)
    model.save_pretrained(folder)
    tiny_tokenizer(texts, LEARNED_TOKENS).save_pretrained(folder)


def write_adapter(model: Path, seed: int, rank: int, folder: Path) -> None:
    """A run with a learning rate of nothing leaves the adapter as it began; this writes it."""
    import torch
    from safetensors.torch import load_file, save_file

    from lora_sft import finetune

    row = {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}
    nothing = {"max_steps": 1, "learning_rate": 1e-300, "save_strategy": "no", "data_cache": "off", "device": "auto"}
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "layout": "tokens"}
    adapter = {"lora_r": rank, "lora_alpha": 2 * rank, "seed": seed}
    finetune(model, [row], output_dir=folder, listeners=[], max_lost_share=1.0, **nothing, **batches, **adapter)
    weights = load_file(folder / "adapter_model.safetensors")
    for name, weight in weights.items():
        if "lora_B" in name:
            weights[name] = torch.zeros_like(weight)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def main(what: str, *words: str) -> None:
    """`model NAME SIZES DATA_DIR FOLDER` or `adapter MODEL SEED RANK FOLDER`; a folder counts once it is whole."""
    from bench.training.rows import texts_of

    folder = Path(words[-1])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / "made"
        if what == "model":
            shape = SHAPES[words[0]]
            sizes = {**shape.sizes, **json.loads(words[1])}
            write_model(Shape(shape.kind, sizes, shape.needs_cuda), texts_of(Path(words[2])), made)
        else:
            write_adapter(Path(words[0]), int(words[1]), int(words[2]), made)
        (made / "done").touch()
        made.rename(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
