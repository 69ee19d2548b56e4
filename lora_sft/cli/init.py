"""`lora-sft init`: a commented file of settings."""

from pathlib import Path

import click

from lora_sft.cli.options import json_option, print_json
from lora_sft.errors import OutputError


@click.command("init")
@click.argument("file", default="lora_sft.yaml")
@json_option
def command(file: str, as_json: bool) -> None:
    """Write FILE (lora_sft.yaml), a commented file of all settings; - prints it."""
    from lora_sft.settings import commented_yaml

    if file == "-":
        click.echo(commented_yaml(), nl=False)
        return
    path = Path(file)
    if path.exists():
        raise OutputError(f"{path}: exists already; name another file, or use - to print the settings")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commented_yaml(), encoding="utf-8")
    if as_json:
        print_json({"path": str(path)})
    else:
        click.echo(f"{path}: fill in the model and the dataset, then run `lora-sft train {path}`", err=True)
