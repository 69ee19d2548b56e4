"""`lora-sft templates`: the chat templates that ship with the package."""

from dataclasses import asdict

import click

from lora_sft.cli.options import json_option, print_json


@click.group("templates", invoke_without_command=True)
@click.pass_context
@json_option
def command(ctx: click.Context, as_json: bool) -> None:
    """List the chat templates, or show one."""
    if ctx.invoked_subcommand is None:
        _list(as_json)


@command.command("list")
@click.pass_context
@json_option
def list_(ctx: click.Context, as_json: bool) -> None:
    """List the templates that come with the package."""
    _list(as_json or _asked_before(ctx))


@command.command("show")
@click.argument("name")
@click.pass_context
@json_option
def show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Print the template NAME, or the one in a .jinja file."""
    from lora_sft.chat.templates import find_template

    template = find_template(name)
    if as_json or _asked_before(ctx):
        print_json({"name": template.name, **template.about, "text": template.text})
    else:
        click.echo(template.text, nl=False)


def _asked_before(ctx: click.Context) -> bool:
    """Whether `--json` stands before the name of the subcommand."""
    return bool(ctx.parent and ctx.parent.params["as_json"])


def _list(as_json: bool) -> None:
    from lora_sft.chat.templates import shipped_templates

    found = shipped_templates()
    if as_json:
        print_json([{"name": template.name, **template.about} for template in found])
        return
    from rich.text import Text

    from lora_sft.console import console, table_of

    table = table_of("name", "models", "ends a reply with", "tools", "thinking")
    for template in found:
        about = (template.about.get(key, "") for key in ("models", "stop", "tools", "thinking"))
        table.add_row(template.name, *map(Text, about))
    console(results=True).print(table)


@command.command("check")
@click.argument("name", metavar="NAME-or-path-or-model")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model's tokenizer.")
@click.pass_context
@json_option
def check(ctx: click.Context, name: str, trust_remote_code: bool, as_json: bool) -> None:
    """Try a template on many kinds of conversations: one of ours, a .jinja file, or that of a model.

    Exit code 3 if a word of anybody else would be learned, or a word of a reply would silently not be.
    """
    from lora_sft.api import check
    from lora_sft.chat.check import WRONG
    from lora_sft.console import console
    from lora_sft.report.views import findings_view

    found = check(name, trust_remote_code=trust_remote_code)
    if as_json or _asked_before(ctx):
        print_json([asdict(finding) for finding in found])
    else:
        console(results=True).print(findings_view(name, found))
    if any(finding.status == WRONG for finding in found):
        ctx.exit(3)
