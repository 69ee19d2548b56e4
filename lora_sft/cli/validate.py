"""`lora-sft validate`: every row read, every problem told, and the numbers that people look at first."""

import click

from lora_sft.cli.options import LOOSE, SettingsCommand, json_option, print_json, read_words, settings_argument


@click.command("validate", cls=SettingsCommand, context_settings=LOOSE)
@settings_argument
@click.option("--limit", type=click.IntRange(0), default=20, show_default=True, help="Show so many problems.")
@json_option
@click.pass_context
def command(ctx: click.Context, words: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Check a dataset: lora-sft validate --dataset D [--model M].

    With a model, its chat template and tokenizer are tried on every row too. Exit code 2 if there are rows that cannot
    be trained on.
    """
    file, settings = read_words(words)
    from lora_sft.api import validate
    from lora_sft.console import console
    from lora_sft.report.views import report_view

    report = validate(config=file, **settings)
    if as_json:
        print_json(report.to_json())
    else:
        console(results=True).print(report_view(report, limit))
    if report.grave:
        ctx.exit(2)
