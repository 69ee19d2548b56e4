"""`lora-sft generate`: replies to prompts, without a conversation."""

import sys

import click

from lora_sft.cli.options import json_option, print_json
from lora_sft.errors import DataError


@click.command("generate")
@click.argument("path")
@click.argument("prompts", nargs=-1)
@click.option("--system", default=None, help="System prompt.")
@click.option("--max-new-tokens", default=512, show_default=True, help="Longest reply.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token; above 0 draws.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw only from the likeliest tokens of this share.")
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
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
    as_json: bool,
) -> None:
    """Let PATH, an adapter folder or a model, reply to each of PROMPTS; without any, to each line of standard input."""
    texts = list(prompts) or [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise DataError("no prompt: give one or more behind the model, or lines on standard input")
    from transformers import set_seed

    from lora_sft.api import load

    model = load(path, device)
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
