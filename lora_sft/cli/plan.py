"""`lora-sft plan`: does it fit, which settings, how long; from a model's configuration alone."""

from pathlib import Path
from typing import Any

import click

from lora_sft.cli.options import LOOSE, SettingsCommand, json_option, print_json, read_words, settings_argument
from lora_sft.errors import SettingError


@click.command("plan", cls=SettingsCommand, context_settings=LOOSE)
@settings_argument
@click.option("--gpu", default=None, help="A card: rtx4090, t4, a100, … Unset: this machine.")
@click.option("--vram", default=None, help="Memory of the GPU instead of a card, or of it: 24GiB.")
@click.option("--lengths", default=None, help="Tokens of the examples instead of a dataset: 200,512,2048 or 512x1000.")
@click.option("--calibrate", is_flag=True, help="Take ten real steps on this machine, so that the seconds are its own.")
@click.option(
    "--table", "as_table", is_flag=True, help="What each size of this model's family needs, by context length."
)
@click.option("--picture", default=None, metavar="FILE.svg", help="With --table: also draw it.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    words: tuple[str, ...],
    as_table: bool,
    picture: str | None,
    as_json: bool,
    lengths: str | None,
    **target: Any,
) -> None:
    """Say what a run needs before it starts: lora-sft plan --model M --dataset D --gpu rtx4090.

    No weights are read. With --auto the settings are chosen. Exit code 3 if it does not fit.
    """
    _refuse_pairs(as_table, picture, {"lengths": lengths, **target})
    file, settings = read_words(words)
    from lora_sft.api import plan, plan_table
    from lora_sft.console import console, say
    from lora_sft.planning.table import picture_of
    from lora_sft.planning.workload import read_lengths
    from lora_sft.report.plan_view import plan_view, table_view

    if as_table:
        table = plan_table(config=file, **settings)
        if picture is not None:
            Path(picture).write_text(picture_of(table), encoding="utf-8")
            say("picture", picture)
        print_json(table.to_json()) if as_json else console(results=True).print(table_view(table))
        return
    found = plan(config=file, lengths=None if lengths is None else read_lengths(lengths), **target, **settings)
    print_json(found.to_json()) if as_json else console(results=True).print(plan_view(found))
    if not found.fits:
        ctx.exit(3)


def _refuse_pairs(as_table: bool, picture: str | None, others: dict[str, Any]) -> None:
    """Raises SettingError for options that would have no effect together."""
    if picture is not None and not as_table:
        raise SettingError("picture: draws the table; add --table")
    if as_table and (given := [f"--{name}" for name, value in others.items() if value]):
        raise SettingError(f"table: tells all cards and lengths; leave out {', '.join(given)}")
