"""What the commands share: `--json`, settings as flags, and their help."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from lora_sft.console import is_main_process

Command = TypeVar("Command", bound=Callable[..., Any])

# Of the setting words behind a command: nothing is parsed by click, all by `settings.from_words`.
LOOSE = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}


def json_option(function: Command) -> Command:
    """Adds `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")(function)


def print_json(document: Any) -> None:
    """A JSON document on standard output; of several processes the main one prints it."""
    if is_main_process():
        click.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def model_options(function: Command) -> Command:
    """Adds what every command needs that loads a trained model: `--device`, `--trust-remote-code`."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the base model."),
        click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True),
    ):
        function = option(function)
    return function


def reply_options(function: Command) -> Command:
    """Adds how replies are made: `--system`, `--max-new-tokens`, `--temperature`, `--top-p`."""
    for option in (
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=1.0,
            show_default=True,
            help="Draw only from the likeliest tokens of this share.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(0),
            default=0.0,
            show_default=True,
            help="0 takes the likeliest token; above 0 draws.",
        ),
        click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest reply."),
        click.option("--system", default=None, help="System prompt."),
    ):
        function = option(function)
    return function


class SettingsCommand(click.Command):
    """A command that takes an optional YAML file and then any setting as a flag; its help lists them all."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options, then the settings by section."""
        from lora_sft.config import sections

        super().format_options(ctx, formatter)
        for title, fields in sections():
            with formatter.section(f"{title} settings"):
                formatter.write_dl(
                    [
                        (f"--{name.replace('_', '-')} {_form(field)}", f"{field.description}{_default(field)}")
                        for name, field in fields.items()
                    ]
                )


def settings_argument(function: Command) -> Command:
    """Adds the words behind the command: [FILE.yaml] [--setting value | setting=value] …"""
    return click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[FILE.yaml] [SETTINGS]")(function)


def read_words(words: tuple[str, ...]) -> tuple[Path | None, dict[str, Any]]:
    """Those words → the YAML file, if one is named first, and the settings.

    Raises:
        SettingError: a word that is no setting.
    """
    from lora_sft.settings import from_words

    has_file = bool(words) and not words[0].startswith("-") and "=" not in words[0]
    return (Path(words[0]) if has_file else None), from_words(words[1:] if has_file else words)


def _form(field: Any) -> str:
    """How a value is written: `A|B`, `NUMBER`, `NAMES`, …; nothing for a switch."""
    kind = str(field.annotation)
    if "Literal[" in kind:
        return kind.partition("Literal[")[2].partition("]")[0].replace("'", "").replace(", ", "|")
    for mark, form in (
        ("bool", ""),
        ("dict", "{KEY: VALUE}"),
        ("list", "NAMES"),
        ("int", "NUMBER"),
        ("float", "NUMBER"),
    ):
        if mark in kind:
            return form
    return "TEXT"


def _default(field: Any) -> str:
    return (
        ""
        if field.default in (None, {}, [], "none", ["none"])
        else f" [default: {str(field.default).lower() if isinstance(field.default, bool) else field.default}]"
    )
