"""How long a training stands still for a checkpoint, ours beside that of transformers and TRL.

`python -m bench.checkpoints [ROUNDS]` makes a model of random weights with an adapter, trains one step, and lets both
write that state in turn, round by round. Ours goes on hashing and waits for the disk while the training goes on; how
long that takes is told too, and so is the whole, as if nothing were trained meanwhile.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
RANKS = {"25 MB adapter": 32, "200 MB adapter": 256}
BOUND = 1.1


def trainer_for(folder: Path, rank: int) -> Any:
    """A trainer after its first step, so that the optimizer has its moments."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lora_sft.chat.labels import Example
    from lora_sft.config import RunConfig
    from lora_sft.model.adapter import attach, lora_config
    from lora_sft.model.tiny import tiny_tokenizer
    from lora_sft.model.tokenizer import prepare_speech
    from lora_sft.training.trainer import build_trainer, training_arguments

    config = RunConfig.model_validate(
        {"output_dir": str(folder), "lora_r": rank, "max_steps": 1, "save_strategy": "no", "device": "cpu"}
        | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    )
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16)
    speech = prepare_speech(tiny_tokenizer(["hello there"], 300), None, None, None)
    model = attach(model, lora_config(config, [], model), 0)
    examples = [Example(list(range(3, 11)), list(range(3, 11)))]
    arguments = training_arguments(config, "cpu", "float32", has_eval_data=False)
    trainer = build_trainer(model, speech, examples, [], config, arguments, [])
    trainer.train()
    return trainer


def timed(action: Callable[[], object]) -> float:
    """Wall-clock seconds."""
    clock = time.perf_counter()
    action()
    return time.perf_counter() - clock


def compare(folder: Path, rank: int, rounds: int) -> dict[str, float]:
    """Medians in seconds of the pause of each side, and of the rest of ours."""
    from trl import SFTTrainer

    trainer = trainer_for(folder, rank)
    taken: dict[str, list[float]] = {"ours": [], "theirs": [], "ours, afterwards": []}
    for number in range(1, rounds + 1):
        trainer.state.global_step = 2 * number
        taken["ours"].append(timed(lambda: trainer._save_checkpoint(trainer.model, None)))
        taken["ours, afterwards"].append(timed(trainer.checkpoints.wait))
        trainer.state.global_step = 2 * number + 1
        taken["theirs"].append(timed(lambda: SFTTrainer._save_checkpoint(trainer, trainer.model, None)))
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return {side: statistics.median(seconds) for side, seconds in taken.items()}


def main(rounds: int = 9) -> None:
    """Prints a line a size, and the whole as JSON."""
    found = {}
    for size, rank in RANKS.items():
        with tempfile.TemporaryDirectory() as name:
            found[size] = compare(Path(name), rank, rounds)
        ratio = found[size]["ours"] / found[size]["theirs"]
        found[size]["ratio"] = ratio
        verdict = "within" if ratio <= BOUND else "above"
        print(
            f"{size}: the training stands still for {found[size]['ours']:.2f} s, {ratio:.2f} times as long as for "
            f"transformers' {found[size]['theirs']:.2f} s, {verdict} {BOUND}; hashed and on the disk "
            f"{found[size]['ours, afterwards']:.2f} s later (medians of {rounds})"
        )
    print(json.dumps({size: {name: round(value, 3) for name, value in one.items()} for size, one in found.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
