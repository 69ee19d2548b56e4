"""`lora-sft merge`: an adapter and its base → one model."""

import click

from lora_sft.cli.options import json_option, print_json


@click.command("merge")
@click.argument("adapter")
@click.option("--output", required=True, help="Folder of the merged model; must not exist yet.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Of the written weights; auto: as in training.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="Where the result is compared with the adapter.",
)
@json_option
def command(adapter: str, output: str, dtype: str, device: str, as_json: bool) -> None:
    """Merge the folder ADAPTER into its base, and compare the result with it."""
    from lora_sft.api import merge
    from lora_sft.console import say

    result = merge(adapter, output, dtype=dtype, device=device)
    if as_json:
        print_json(result)
        return
    verified = result["verified"]
    say(
        "compared",
        f"mean KL {verified['mean_kl']:.1e} (the adapter's own effect: {verified['adapter_effect']:.1e}), same first "
        f"choice at {verified['top1_agreement']:.1%} of positions",
    )
    say("merged", f"{result['output_dir']} ({result['dtype']})")
