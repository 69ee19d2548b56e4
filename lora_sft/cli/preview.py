"""`lora-sft preview`: conversations as the model sees them, with the learned part marked."""

import json
from itertools import islice

import click

from lora_sft.cli.options import LOOSE, SettingsCommand, json_option, read_words, settings_argument


@click.command("preview", cls=SettingsCommand, context_settings=LOOSE)
@settings_argument
@click.option(
    "--limit", type=click.IntRange(0), default=None, help="Show so many conversations (3 without --json, else all)."
)
@json_option
def command(words: tuple[str, ...], limit: int | None, as_json: bool) -> None:
    """Show what is learned of each conversation: lora-sft preview --model M --dataset D."""
    file, settings = read_words(words)
    from lora_sft.api import preview
    from lora_sft.console import console
    from lora_sft.report.views import conversation_view

    for shown in islice(preview(config=file, **settings), 3 if limit is None and not as_json else limit):
        if as_json:
            record = {
                "source": shown.source,
                "text": shown.rendered.text,
                "supervised": shown.rendered.supervised,
                "input_ids": shown.example.input_ids,
                "labels": shown.example.labels,
            }
            click.echo(json.dumps(record, ensure_ascii=False))
        else:
            console(results=True).print(
                conversation_view(
                    shown.rendered, shown.source, shown.example.supervised_tokens, len(shown.example.input_ids)
                )
            )
            for note in shown.rendered.notes:
                console(results=True).print(f"reply {note.turn + 1}: {note.words}", style="yellow")
