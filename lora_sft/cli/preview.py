"""`lora-sft preview`: conversations as the model sees them, with the learned part marked."""

import json
from itertools import islice
from pathlib import Path

import click

from lora_sft.cli.options import LOOSE, SettingsCommand, json_option, read_words, settings_argument


@click.command("preview", cls=SettingsCommand, context_settings=LOOSE)
@settings_argument
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=None,
    help="Show so many conversations (3; 50 with --html; all with --json).",
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Write a page with every token, its id on hover.",
)
@json_option
def command(words: tuple[str, ...], limit: int | None, html: Path | None, as_json: bool) -> None:
    """Show what is learned of each conversation: lora-sft preview --model M --dataset D."""
    file, settings = read_words(words)
    from lora_sft.api import preview
    from lora_sft.console import console, say
    from lora_sft.report.preview_page import preview_page
    from lora_sft.report.views import tokens_view

    wanted = limit if limit is not None else 50 if html else None if as_json else 3
    shown = islice(preview(config=file, **settings), wanted)
    if html:
        page = preview_page(shown, f"{settings.get('dataset', 'conversations')}: what is learned")
        html.write_text(page, encoding="utf-8")
        say("page", str(html))
        return
    for one in shown:
        if as_json:
            record = {
                "source": one.source,
                "text": one.rendered.text,
                "supervised": one.rendered.supervised,
                "input_ids": one.example.input_ids,
                "labels": one.example.labels,
                "notes": [note._asdict() for note in one.rendered.notes],
                "warning": one.warning,
            }
            click.echo(json.dumps(record, ensure_ascii=False))
        else:
            console(results=True).print(tokens_view(one))
