"""`lora-sft evaluate`: loss, perplexity and token accuracy of an adapter and its base."""

import click

from lora_sft.cli.options import json_option, model_options, print_json


@click.command("evaluate")
@click.argument("path")
@click.option("--dataset", required=True, help="Conversations: a file, a folder or a hub name.")
@click.option("--dataset-split", default="train", show_default=True, help="Which split of a hub dataset.")
@click.option(
    "--max-length",
    type=click.IntRange(2),
    default=2048,
    show_default=True,
    help="Longer conversations are left out, and counted.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Conversations in one forward pass."
)
@click.option("--chat-template", default=None, help="A template's name or file. Unset: the model's own.")
@click.option("--layout", default=None, help="How the rows are written. Unset: found out.")
@click.option("--columns", default=None, help="What the data calls our columns: prompt=question,completion=answer.")
@click.option("--roles", default=None, help="What the data calls our roles: bot=assistant.")
@model_options
@json_option
def command(
    path: str,
    dataset: str,
    dataset_split: str,
    max_length: int,
    batch_size: int,
    chat_template: str | None,
    layout: str | None,
    columns: str | None,
    roles: str | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure PATH, an adapter folder or a model, on the replies of a dataset."""
    from lora_sft.api import evaluate

    found = evaluate(
        path,
        dataset,
        max_length=max_length,
        batch_size=batch_size,
        split=dataset_split,
        device=device,
        trust_remote_code=trust_remote_code,
        chat_template=chat_template,
        layout=layout,
        columns=columns,
        roles=roles,
    )
    if as_json:
        print_json(found)
        return
    from lora_sft.console import console
    from lora_sft.report.views import measures_view

    console(results=True).print(measures_view(found))
