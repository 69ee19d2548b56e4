"""The command line: one small file a command, and the only place that prints results. Imports no torch."""

import os
import sys
import warnings
from typing import Any

import click

from lora_sft.errors import LoraSftError


class JourneyOrder(click.Group):
    """Lists the commands in the order in which a person meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which they were added."""
        return list(self.commands)


@click.group(cls=JourneyOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lora_sft", prog_name="lora-sft")
def commands() -> None:
    """LoRA and QLoRA fine-tuning whose promises are proven on your own model.

    Start with `lora-sft demo`. Every command takes --json: results go to standard output, words for people to
    standard error.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Runs a command; an error becomes one message and the exit code of its class."""
    _quiet_libraries()
    _add_commands()
    try:
        return commands.main(arguments, prog_name="lora-sft", standalone_mode=True)
    except LoraSftError as error:
        _say_error(str(error), everywhere=error.exit_code == 1)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output has gone: `lora-sft schema | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - held until the process ends
        sys.exit(1)


def _add_commands() -> None:
    from lora_sft.cli import (
        chat,
        demo,
        doctor,
        evaluate,
        export,
        generate,
        init,
        merge,
        plan,
        preview,
        replay,
        schema,
        templates,
        train,
        validate,
    )

    to_a_model = (demo, init, validate, preview, plan, train, replay)
    from_a_model = (evaluate, chat, generate, merge, export)
    for module in (*to_a_model, *from_a_model, templates, doctor, schema):
        commands.add_command(module.command)


def _say_error(words: str, everywhere: bool = False) -> None:
    """On standard error; of several processes in the main one, or, where one may have failed alone, in each."""
    from rich.text import Text

    from lora_sft.console import console, is_main_process

    if everywhere and not is_main_process():
        click.echo(f"error (process {os.environ['RANK']}): {words}", err=True)
        return
    console().print(Text.assemble(("error", "bold red"), ": ", words), soft_wrap=True)


def _quiet_libraries() -> None:
    """What other libraries say while they load is not for the user of a command line; ours is."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other give the core up after some microseconds instead of milliseconds: where
        # another program keeps a core busy a step took 4 to 7 times as long, where none does it is the same.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # looking for them takes longer than a quick command
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
