"""`lora-sft demo`: the whole journey on a tiny model, offline, in a minute or two."""

from pathlib import Path
from typing import Any

import click

from lora_sft.cli.options import json_option, print_json
from lora_sft.console import console, say
from lora_sft.errors import OutputError, VerificationError
from lora_sft.resources import shipped

# Wide enough initial weights that a random model has something for the adapter to steer.
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.08,
}
SETTINGS: dict[str, Any] = {
    "max_steps": 220,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 4e-3,
    "lora_r": 32,
    "lora_alpha": 64,
    "save_strategy": "no",
}
PARTS = ("base", "adapter", "merged")
QUESTIONS = ("Who are you?", "How do I tie a bowline?", "What is a spring tide?", "Will it rain tomorrow?")


@click.command("demo")
@click.option("--output", default=None, help="Keep model, adapter and merged model in this folder.")
@click.option("--seed", default=42, show_default=True, help="Of the adapter's start and the order of the rows.")
@json_option
def command(output: str | None, seed: int, as_json: bool) -> None:
    """Make a tiny model, QLoRA-train it on a small dataset, show its replies before and after, merge, compare."""
    import tempfile

    if taken := [part for part in PARTS if output and (Path(output) / part).exists()]:
        raise OutputError(f"{Path(output or '') / taken[0]}: exists already; name another folder with --output")
    import torch

    # Matrices this small are no work for two threads: on a busy machine they wait for each other many times longer.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        result = run_demo(Path(output or scratch), seed)
    if as_json:
        if not output:  # the folder is gone by now
            result["train"]["output_dir"] = result["merge"]["output_dir"] = None
        print_json(result)
    elif output:
        say("kept", f"{output}: base, adapter and merged model; try `lora-sft chat {Path(output) / 'adapter'}`")
    if any(reply["merged"] != reply["after"] for reply in result["replies"]):
        raise VerificationError("the merged model does not answer as the adapter does")


def run_demo(folder: Path, seed: int) -> dict[str, Any]:
    """The demo in a folder → {"train", "merge", "replies": [{"question", "before", "after", "merged"}]}."""
    from lora_sft.api import Chat, finetune, load
    from lora_sft.data.formats import to_conversations
    from lora_sft.data.sources import read_rows
    from lora_sft.model.tiny import save_tiny
    from lora_sft.report.views import replies_view

    def ask(model: Chat) -> list[str]:
        return [model.chat(question, max_new_tokens=60) for question in QUESTIONS]

    data = shipped("examples") / "harbour.jsonl"
    texts = [
        message["content"] for conversation in to_conversations(read_rows(data)) for message in conversation.messages
    ]
    say("demo", "a tokenizer and a random model, made on the spot; it knows nothing yet")
    base = save_tiny(folder / "base", texts, vocabulary_size=1024, **SHAPE)
    before = ask(load(base))
    run = finetune(base, data, output_dir=folder / "adapter", seed=seed, **SETTINGS)
    after = ask(run)
    merge = run.merge(folder / "merged")
    merged = ask(load(folder / "merged"))

    replies = [
        dict(zip(("question", "before", "after", "merged"), row, strict=True))
        for row in zip(QUESTIONS, before, after, merged, strict=True)
    ]
    rows = [
        (r["question"], _printable(r["before"]), r["after"], "the same" if r["merged"] == r["after"] else r["merged"])
        for r in replies
    ]
    console().print(replies_view("What the model says", ("question", "before", "after training", "merged"), rows))
    return {"train": run.metrics, "merge": merge, "replies": replies}


def _printable(text: str, longest: int = 100) -> str:
    """Random replies hold any characters; only those are shown that a terminal can bear."""
    shown = "".join(character if character.isprintable() else "·" for character in text)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"
