"""What an export target is: what it refuses before anything slow, and how it writes and proves its folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sft.model.base import BaseSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Facts:
    """What is known before any weight is read: after training from the adapter's folder, before it from the settings.

    Attributes:
        adapter: PEFT's settings, as in `adapter_config.json`.
        config: the base's.
        tokenizer: with the chat template that was trained.
        adds_tokens: whether the vocabulary grew beyond the base's.
        template_variables: those that the chat template was given in training.
    """

    adapter: Mapping[str, Any]
    config: "PretrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"
    adds_tokens: bool = False
    template_variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """One export.

    Attributes:
        adapter: the adapter folder.
        spec: how its base was loaded in training.
        folder: empty, and under a name of its own; it gets its final name once `write` has returned.
        output: that final name.
        onto: which base a whole model is made from: `trained` or `original`.
        options: of the target, each by its name in `Target.options`.
    """

    adapter: Path
    spec: BaseSpec
    folder: Path
    output: Path
    onto: str = "trained"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A place where a model is served.

    Attributes:
        name: on the command line.
        help: one line.
        refusals: Facts and options → why this cannot be exported there, with what to do instead; empty if it can.
        write: fills `Order.folder`, proves what it wrote (`VerificationError` if it does not hold), and returns what
            belongs into the result: {"verified": {…}, "serve": the command that serves it, …}.
        options: {name: its help} of what the target can be told.
        makes_whole_model: whether base and adapter become one, so that `Order.onto` means something.
        keeps_folder: whether the folder is what the user wants; else it is sent away, and asked for only to be kept.
        needs: {what it needs on this machine: what is wrong with it and how to mend that, or ""}; changes nothing.
    """

    name: str
    help: str
    refusals: Callable[[Facts, Mapping[str, Any]], list[str]]
    write: Callable[[Order], dict[str, Any]]
    options: Mapping[str, str] = field(default_factory=dict)
    makes_whole_model: bool = True
    keeps_folder: bool = True
    needs: Callable[[], Mapping[str, str]] = dict
