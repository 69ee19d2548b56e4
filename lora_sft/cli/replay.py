"""`lora-sft replay`: the micro-batch on which a training failed, once more, module by module."""

from typing import Any

import click

from lora_sft.cli.options import json_option, model_options, print_json

BEFORE, AFTER = 8, 4
"""So many modules are shown before the first bad one, and behind it."""


@click.command("replay")
@click.argument("output_dir")
@click.option("--model", default=None, help="Where the base model is now. Unset: where it was.")
@model_options
@json_option
def command(output_dir: str, model: str | None, device: str, trust_remote_code: bool, as_json: bool) -> None:
    """Run the micro-batch on which the training in OUTPUT_DIR failed again, and show where NaN or Inf begins."""
    from lora_sft.training.replay import replay

    found = replay(output_dir, model, device, trust_remote_code)
    if as_json:
        print_json(found)
        return
    from lora_sft.console import console

    console(results=True).print(_summary(found), _modules(found))


def _summary(found: dict[str, Any]) -> Any:
    from rich.text import Text

    rows = ", ".join(row["source"] or f"example {row['example']}" for row in found["rows"])
    bad = found["first"]
    lines = [
        f"{found['problem']} (micro-batch {found['micro_batch'] + 1} of step {found['step']})",
        f"rows: {rows}",
        f"loss: {found['loss']:.4f} then, {found['loss_now']:.4f} now",
        f"weights with NaN or Inf: {', '.join(found['weights'])}" if found["weights"] else "",
        "first NaN or Inf: "
        + (f"{bad['module']} ({bad['direction']})" + _place(bad) if bad else "none in this micro-batch"),
        "" if found["reproduced"] else "it does not come again here: another device or version, or faulty hardware",
    ]
    return Text("\n".join(line for line in lines if line))


def _place(bad: dict[str, Any]) -> str:
    return f", token {bad['token']} of {bad['source'] or 'row ' + str(bad['row'])}" if bad["row"] is not None else ""


def _modules(found: dict[str, Any]) -> Any:
    """The modules around the first bad one; of a micro-batch without any, those with the largest values."""
    from lora_sft.console import table_of

    looks = found["modules"]
    first = next((place for place, look in enumerate(looks) if look["not_finite"]), None)
    if first is None:
        shown = sorted(looks, key=lambda look: -look["largest"])[: BEFORE + AFTER]
    else:
        shown = looks[max(0, first - BEFORE) : first + AFTER + 1]
    table = table_of("", "module", "pass", "shape", "largest", "NaN or Inf")
    for look in shown:
        mark = "→" if first is not None and look is looks[first] else ""
        shape = "×".join(map(str, look["shape"]))
        table.add_row(
            mark, look["module"], look["direction"], shape, f"{look['largest']:.3g}", f"{look['not_finite']:,}"
        )
    return table
