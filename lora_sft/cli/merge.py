"""`lora-sft merge`: an adapter and its base → one model."""

import click

from lora_sft.cli.options import json_option, model_options, print_json


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
@model_options
@json_option
def command(adapter: str, output: str, dtype: str, device: str, trust_remote_code: bool, as_json: bool) -> None:
    """Merge the folder ADAPTER into its base, and compare the result with it."""
    from lora_sft.console import say
    from lora_sft.export.merge import merge

    result = merge(adapter, output, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
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
