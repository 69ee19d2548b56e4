"""`lora-sft chat`: a conversation with an adapter or a model, in the terminal."""

import click

from lora_sft.cli.options import json_option, model_options, print_json, reply_options


@click.command("chat")
@click.argument("path")
@reply_options
@model_options
@json_option
def command(
    path: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Talk to PATH, an adapter folder or a model. An empty line or Ctrl-D ends; /new starts anew.

    With --json the whole conversation is printed at the end.
    """
    from transformers import TextStreamer

    from lora_sft.api import load

    model = load(path, device, trust_remote_code)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while text := _ask():
        if text == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": text})
        streamer = None if as_json else TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        said = model.chat(
            messages, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, streamer=streamer
        )
        messages.append({"role": "assistant", "content": said})
    if as_json:
        print_json({"messages": messages})


def _ask() -> str:
    try:
        return str(click.prompt(">", prompt_suffix=" ", default="", show_default=False, err=True)).strip()
    except click.Abort:
        return ""
