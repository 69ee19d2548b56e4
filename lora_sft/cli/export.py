"""`lora-sft export`: an adapter → the form that a server wants, proven there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lora_sft.cli.options import LOOSE, json_option, model_options, print_json
from lora_sft.errors import SettingError


class TargetsCommand(click.Command):
    """A command whose help lists the targets with their options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options, then the targets with theirs."""
        from lora_sft.exporting.targets import TARGETS, find_target

        super().format_options(ctx, formatter)
        for target in map(find_target, TARGETS):
            with formatter.section(target.name):
                formatter.write_text(target.help)
                if target.options:
                    formatter.write_dl([(f"{name}=…", words) for name, words in target.options.items()])


@click.command("export", cls=TargetsCommand, context_settings=LOOSE)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="TARGET ADAPTER [OPTION=VALUE]…")
@click.option("--output", default=None, help="Folder of the result; must not exist yet.")
@click.option(
    "--base",
    type=click.Choice(["trained", "original"]),
    default="trained",
    show_default=True,
    help="What a whole model is made from: the weights that training saw (of a quantized base, dequantized), or those "
    "that were published.",
)
@click.option(
    "--force", is_flag=True, help="Export although the adapter or its base is not as the run that made it left it."
)
@model_options
@json_option
def command(
    words: tuple[str, ...],
    output: str | None,
    base: str,
    force: bool,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Export the folder ADAPTER: lora-sft export gguf runs/first --output out quantization=q8_0.

    What a target cannot do right it refuses before anything slow, and what was written is proven before it bears its
    name. The targets and their options are listed below; --option value is the same as option=value.
    """
    target, adapter, options = read_words(words)
    from lora_sft.api import export

    result = export(adapter, target, output, base, device, trust_remote_code, force, **options)
    if as_json:
        print_json(result)
    else:
        _tell(result)


def read_words(words: Sequence[str]) -> tuple[str, str, dict[str, str]]:
    """`gguf runs/first quantization=q8_0` → target, adapter, options. Target and adapter may stand in either order.

    Raises:
        SettingError: there are not just these two, or none is a target.
    """
    from lora_sft.exporting.targets import TARGETS, refuse_unknown

    names, options = _split(words)
    if len(names) != 2:
        raise SettingError(
            f"export takes a target and an adapter folder, not {' '.join(names) or 'nothing'}: lora-sft export gguf "
            f"runs/first --output out; the targets are {', '.join(TARGETS)}"
        )
    turned = names[0] not in TARGETS and (names[1] in TARGETS or Path(names[0]).exists())
    target, adapter = reversed(names) if turned else names
    refuse_unknown([target])
    return target, adapter, options


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Words without an option's name, and the options: `name=value`, `--name=value` or `--name value`."""
    names: list[str] = []
    options: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") and not (has_value and name.replace("-", "_").isidentifier()):
            names.append(word)
            continue
        if not has_value and not rest:
            raise SettingError(f"{word} needs a value")
        options[name.replace("-", "_")] = value if has_value else rest.pop(0)
    return names, options


def _tell(result: Mapping[str, Any]) -> None:
    from lora_sft.console import say

    say("verified", _in_words(result["verified"]))
    for note in result["notes"]:
        say("note", note)
    if result["output_dir"]:
        say("exported", f"{result['output_dir']} ({result['target']})")
    if result["serve"]:
        say("serve", result["serve"])


def _in_words(found: Mapping[str, Any]) -> str:
    """`mean kl 2.1e-06, replies equal yes`; what lies deeper follows its own name."""
    words = []
    for name, value in found.items():
        said = f"({_in_words(value)})" if isinstance(value, Mapping) else _value(value)
        words.append(f"{name.replace('_', ' ')} {said}")
    return ", ".join(words)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
