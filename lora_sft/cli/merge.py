"""`lora-sft merge`: an adapter, or several, and their base → one model."""

from typing import Any

import click

from lora_sft.cli.options import json_option, model_options, print_json
from lora_sft.errors import SettingError


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER…")
@click.option("--output", required=True, help="Folder of the merged model; must not exist yet.")
@click.option(
    "--base",
    type=click.Choice(["trained", "original", "auto"]),
    default="trained",
    show_default=True,
    help="What is merged onto: the weights that training saw (of a quantized base, dequantized), those that were "
    "published, or both, of which the better one is kept.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Of the written weights; auto: as in training.",
)
@click.option(
    "--quantize",
    type=click.Choice(["nf4", "fp4"]),
    default=None,
    help="Quantize the finished model to 4 bits, and say what that loses.",
)
@click.option("--weights", default=None, help="Of several adapters: 0.7,0.3. Unset: 1 each.")
@click.option(
    "--combination",
    type=click.Choice(["linear", "ties", "dare_linear", "dare_ties"]),
    default="linear",
    show_default=True,
    help="How several are added up; linear is the exact sum.",
)
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Share of each update that ties and dare keep.",
)
@click.option(
    "--verify",
    type=click.Choice(["auto", "logits", "tensors", "no"]),
    default="auto",
    show_default=True,
    help="Compare as whole models, tensor by tensor, or not; auto: as whole models where memory allows.",
)
@click.option(
    "--eval-dataset",
    default=None,
    help="Conversations by whose loss --base auto chooses. Unset: the eval_dataset of the run, if it had one.",
)
@click.option(
    "--force", is_flag=True, help="Merge although the adapter or its base is not as the run that made it left it."
)
@model_options
@json_option
def command(adapters: tuple[str, ...], output: str, weights: str | None, as_json: bool, **options: Any) -> None:
    """Merge the folder ADAPTER, or several, into the base, and compare the result with the adapter."""
    parts = _numbers(weights)
    from lora_sft.console import say
    from lora_sft.merging.merge import merge

    result = merge(adapters[0] if len(adapters) == 1 else list(adapters), output, weights=parts, **options)
    if as_json:
        print_json(result)
        return
    say("merged", f"{result['output_dir']} ({result['dtype']})")


def _numbers(text: str | None) -> list[float] | None:
    """`0.7,0.3` → [0.7, 0.3].

    Raises:
        SettingError: it is no list of numbers.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise SettingError(f"--weights {text}: write numbers with commas between them, such as 0.7,0.3") from None
