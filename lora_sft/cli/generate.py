"""`lora-sft generate`: replies to prompts, without a conversation."""

import sys

import click

from lora_sft.cli.options import json_option, model_options, print_json, reply_options
from lora_sft.errors import DataError


@click.command("generate")
@click.argument("path")
@click.argument("prompts", nargs=-1)
@reply_options
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@model_options
@json_option
def command(
    path: str,
    prompts: tuple[str, ...],
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Let PATH, an adapter folder or a model, reply to each of PROMPTS; without any, to each line of standard input."""
    texts = list(prompts) or [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise DataError("no prompt: give one or more behind the model, or lines on standard input")
    from transformers import set_seed

    from lora_sft.api import load

    model = load(path, device, trust_remote_code)
    set_seed(seed)
    opening = [{"role": "system", "content": system}] if system else []
    replies = []
    for text in texts:
        said = model.chat(
            [*opening, {"role": "user", "content": text}],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )
        replies.append({"prompt": text, "reply": said})
        if not as_json:
            click.echo(said)
    if as_json:
        print_json({"replies": replies})
