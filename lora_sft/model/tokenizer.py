"""Settings → the tokenizer, with its chat template, its stop tokens and the tokens to add."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_sft.chat.probe import guess_stop_token
from lora_sft.chat.rendering import plain_template
from lora_sft.chat.stops import stop_tokens_of
from lora_sft.chat.templates import Template, find_template
from lora_sft.console import say
from lora_sft.errors import ModelError, TemplateError
from lora_sft.model.base import BaseSpec

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Speech:
    """What turns conversations into tokens and knows where a reply ends.

    Attributes:
        tokenizer: with the chat template that is trained.
        stop_tokens: the tokens that end a reply.
        new_token_ids: ids of the tokens that were added, to be trained.
    """

    tokenizer: "PreTrainedTokenizerBase"
    stop_tokens: list[str]
    new_token_ids: list[int] = field(default_factory=list)


def load_tokenizer(spec: BaseSpec) -> "PreTrainedTokenizerBase":
    """The tokenizer that lies with the model.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"model {spec.name}: has no tokenizer that can be read: {str(error).splitlines()[0]}"
        ) from None


def read_generation_config(spec: BaseSpec) -> "GenerationConfig | None":
    """The model's `generation_config.json`; None if it has none.

    Raises:
        ModelError: it has one that cannot be read.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(spec.name, revision=spec.revision)
    except (OSError, ValueError, TypeError) as error:
        if (Path(spec.name).expanduser() / "generation_config.json").is_file():
            raise ModelError(f"model {spec.name}: its generation_config.json cannot be read: {error}") from None
        return None


def prepare_speech(
    tokenizer: "PreTrainedTokenizerBase",
    generation_config: "GenerationConfig | None" = None,
    chat_template: str | None = None,
    new_tokens: list[str] | None = None,
    chat_template_dir: str | None = None,
) -> Speech:
    """Gives the tokenizer its template, new tokens and a padding token; changes it in place.

    Args:
        generation_config: names further stop tokens.
        chat_template: a name in `templates/` or a path; None keeps the tokenizer's own.
        new_tokens: tokens to add to the vocabulary.
        chat_template_dir: holds further templates.

    Raises:
        ModelError: the tokenizer belongs to another model.
        TemplateError: no template, or one whose stop token the vocabulary lacks.
    """
    refuse_foreign_tokenizer(tokenizer, generation_config)
    template = find_template(chat_template, chat_template_dir) if chat_template is not None else None
    new_ids = _add_tokens(tokenizer, new_tokens or [], template.text if template else str(tokenizer.chat_template))
    if template is not None:
        _use_template(tokenizer, template)
    plain_template(tokenizer)  # there must be one
    stops = stop_tokens_of(tokenizer, generation_config.eos_token_id if generation_config else None)
    known = tokenizer.get_vocab()
    stops += [stop for stop in (template.stops if template else ()) if stop in known and stop not in stops]
    if not stops:
        raise TemplateError(
            "neither the tokenizer nor the generation config names a token that ends a reply (eos_token), so the "
            "model could not learn to stop"
        )
    if guessed := guess_stop_token(tokenizer, stops):
        say(
            "stop token",
            f"{guessed} (guessed: with it the chat template ends a reply, and not with {', '.join(stops)})",
        )
        stops.append(guessed)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or stops[0]
        say(
            "padding",
            f"{tokenizer.pad_token} (the tokenizer names none; padding is masked, so the stop token stays learned)",
        )
    return Speech(tokenizer, stops, new_ids)


def refuse_foreign_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", generation_config: "GenerationConfig | None"
) -> None:
    """Tells the tokenizer of another model by the tokens that begin and end a text: there, they are none or words.

    Raises:
        ModelError: names them.
    """
    named = {name: getattr(generation_config, f"{name}_token_id", None) for name in ("bos", "eos")}
    ids = {name: value if isinstance(value, list) else [value] for name, value in named.items() if value is not None}
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if ids and not any(token in special for found in ids.values() for token in found):
        words = [
            f"{name} {token} is {tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else 'no token'!r}"
            for name, found in ids.items()
            for token in found
        ]
        raise ModelError(
            f"the tokenizer belongs to another model: in it, what generation_config.json names as {'; '.join(words)}, "
            "no special token; give the tokenizer that the model was trained with, or mend generation_config.json"
        )


def _add_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: list[str], template: str) -> list[int]:
    """Adds what is missing. A token that the template writes is a special one, which a reply is shown without."""
    known = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in known]
    if present := [token for token in tokens if token in known]:
        say("new tokens", f"{', '.join(present)} was in the vocabulary before")
    tokenizer.add_tokens([token for token in missing if token in template], special_tokens=True)
    tokenizer.add_tokens([token for token in missing if token not in template])
    return [int(i) for i in tokenizer.convert_tokens_to_ids(tokens)]


def _use_template(tokenizer: "PreTrainedTokenizerBase", template: Template) -> None:
    """Sets the template; the token with which it ends a reply becomes the tokenizer's eos."""
    tokenizer.chat_template = template.text
    if not template.stops or template.stops[0] == tokenizer.eos_token:
        return
    stop, vocabulary = template.stops[0], tokenizer.get_vocab()
    if stop not in vocabulary:
        lacking = ",".join(token for token in template.about.get("tokens", stop).split() if token not in vocabulary)
        raise TemplateError(
            f"template {template.name} ends replies with {stop}, which is not in the vocabulary; "
            f'add it with new_tokens (--new-tokens "{lacking}"), or choose zephyr, which needs no new tokens'
        )
    say(
        "stop token",
        f"{stop} (with it {template.name} ends a reply; it takes the place of {tokenizer.eos_token} as eos)",
    )
    tokenizer.eos_token = stop


def teach_stop_tokens(model: "PreTrainedModel", speech: Speech) -> None:
    """Enters the stop and padding tokens into the model's generation config, so that replies end where they should."""
    ids = [int(i) for i in speech.tokenizer.convert_tokens_to_ids(speech.stop_tokens)]
    model.generation_config.eos_token_id = ids[0] if len(ids) == 1 else ids
    model.generation_config.pad_token_id = speech.tokenizer.pad_token_id
