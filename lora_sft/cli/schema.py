"""`lora-sft schema`: the settings as a JSON schema, for editors and other programs."""

import click

from lora_sft.cli.options import json_option, print_json


@click.command("schema")
@json_option
def command(as_json: bool) -> None:
    """Print the JSON schema of all settings."""
    from lora_sft.config import RunConfig

    print_json(RunConfig.model_json_schema())
