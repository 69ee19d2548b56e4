"""An adapter's evaluation set → what measures a merged folder on it, so that the better of two bases can be kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_sft.config import RunConfig
from lora_sft.console import say
from lora_sft.data.intake import Intake
from lora_sft.errors import UsageError
from lora_sft.model.base import BaseSpec
from lora_sft.model.loading import load_model, manifest_of, tokenizer_of, trained_base
from lora_sft.model.tokenizer import prepare_speech, read_generation_config
from lora_sft.preparation.dataset import conversations_of, sources_of
from lora_sft.preparation.prepare import prepare
from lora_sft.publishing.public import read_run
from lora_sft.training.evaluation import measure

Losses = Callable[[Path], float]
"""A folder → its loss on the evaluation set, in nats a token."""


def losses_on(given: Any, adapter: Path, device: str, trust_remote_code: bool) -> Losses | None:
    """What measures a merged folder; None if there is nothing to measure on.

    Args:
        given: conversations, as `finetune` takes them, read as the run of the adapter read its own; None takes that
            run's own evaluation set, if it had one that can still be read.

    Raises:
        UsageError: the set that was given cannot be read.
    """
    config = read_run(adapter) or RunConfig()
    dataset = config.eval_dataset if given is None else given
    if dataset is None:
        return None
    spec = trained_base(adapter, device, trust_remote_code)
    manifest, tokenizer = manifest_of(adapter), tokenizer_of(adapter, spec)
    speech = prepare_speech(tokenizer, read_generation_config(BaseSpec(str(adapter))) or read_generation_config(spec))
    variables, replies = manifest.get("chat_template_kwargs", {}), manifest.get("replies", {})
    try:
        sources = sources_of(dataset, config, config.eval_dataset_split or config.dataset_split)
        stream = conversations_of(sources, Intake(), config.on_bad_row)
        prepared = prepare(stream, speech, config.max_length, variables=variables, **replies)
    except UsageError as error:
        if given is not None:
            raise
        say("loss", f"not measured: the run's own eval_dataset cannot be read any more ({error})")
        return None

    def loss_of(folder: Path) -> float:
        model = load_model(folder, device, trust_remote_code).model
        return measure(model, prepared.examples, int(tokenizer.pad_token_id))["loss"]

    return loss_of
