"""`lora-sft train`: conversations in, adapter out."""

import click

from lora_sft.cli.options import LOOSE, SettingsCommand, json_option, print_json, read_words, settings_argument
from lora_sft.errors import RunError


@click.command("train", cls=SettingsCommand, context_settings=LOOSE)
@settings_argument
@json_option
def command(words: tuple[str, ...], as_json: bool) -> None:
    """Train an adapter: lora-sft train run.yaml --learning-rate 1e-4 seed=7.

    A YAML file comes first; flags win over it. --learning-rate 2e-4, --learning_rate 2e-4 and learning_rate=2e-4
    are the same; a switch is --bf16, --no-bf16 or --bf16 true. Anything else of transformers' TrainingArguments
    can be given by its name.
    """
    file, settings = read_words(words)
    import lora_sft  # as users do: it is loaded without stops for garbage

    try:
        run = lora_sft.finetune(config=file, **settings)
    except KeyboardInterrupt:
        raise RunError(
            "interrupted; from the last checkpoint, if one was written, the same command goes on with "
            "--resume-from-checkpoint true and the output folder of this run"
        ) from None
    _end_together()
    if as_json:
        print_json(run.metrics)
        return
    from lora_sft.console import say

    result = run.metrics
    losses = f"loss {result['first_loss']:.4f} → {result['last_loss']:.4f}" if result["first_loss"] is not None else ""
    say(
        "done",
        f"{result['steps']} steps in {result['seconds']:.0f} s, {losses}, {result['supervised_tokens']:,} tokens "
        "learned",
    )
    say("adapter", str(run.output_dir))
    say("next", f"lora-sft chat {run.output_dir}   or   lora-sft merge {run.output_dir} --output merged")


def _end_together() -> None:
    """Several processes wait for the one that writes, and close what joins them before the interpreter ends.

    torch asks for it; where it was left out, one of two processes was once seen to abort at its end.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
