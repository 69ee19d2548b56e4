"""An adapter and its base → a GGUF and a Modelfile for Ollama, whose Go template writes what was trained.

Ollama puts the bos token before a prompt if the GGUF says so, whatever the prompt begins with; so a bos token that the
chat template writes is left out of the Go template then, and only then.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_sft.chat.stops import stop_tokens_of
from lora_sft.console import say
from lora_sft.errors import SettingError, TemplateError, VerificationError
from lora_sft.exporting.gguf import GGUF
from lora_sft.exporting.go.derive import GoTemplate, derive
from lora_sft.exporting.target import Facts, Order, Target
from lora_sft.model.loading import MANIFEST, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_OPTIONS = {
    "num_ctx": "How many tokens Ollama keeps of a conversation (default: Ollama's own).",
    "chat_template_kwargs": "Variables of the chat template, over those of the training: {date_string: 26 Jul 2024}.",
}


def ollama_refusals(facts: Facts, options: Mapping[str, Any]) -> list[str]:
    """Why this cannot be served with Ollama; empty if it can."""
    problems = list(GGUF.refusals(facts, _of_gguf(options)))
    try:
        _num_ctx(options)
        derive(facts.tokenizer, {**facts.template_variables, **_asked_variables(options)})
    except (SettingError, TemplateError) as error:
        problems.append(str(error))
    return problems


def modelfile(gguf: str, template: str, stops: Sequence[str], num_ctx: int | None = None) -> str:
    """The text of a Modelfile.

    Args:
        gguf: the file's name beside it.
        template: Go source.
        stops: tokens that end a reply.
        num_ctx: tokens that are kept of a conversation; None leaves it to Ollama.

    Raises:
        TemplateError: Ollama would read the template otherwise than it stands here.
    """
    odd = sorted({symbol for symbol in template if not (symbol.isprintable() or symbol in "\n\t")})
    if '"""' in template or odd:
        raise TemplateError(f"a Modelfile has no way to write {odd or 'three quotes'} in a template")
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    lines += [f"PARAMETER num_ctx {num_ctx}"] if num_ctx is not None else []
    return "\n".join(lines) + "\n"


def adds_bos(gguf: Path) -> bool:
    """Whether the file says that the bos token is put before a prompt.

    Raises:
        VerificationError: it does not say.
    """
    from gguf import GGUFReader

    found = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    if found is None:  # llama.cpp and Ollama's own engine take different defaults
        raise VerificationError(
            f"{gguf.name}: does not say whether a bos token is added (tokenizer.ggml.add_bos_token)"
        )
    return bool(found.contents())


def _write(order: Order) -> dict[str, Any]:
    """The GGUF as its own target writes it, and the Modelfile."""
    num_ctx, variables = _num_ctx(order.options), _trained_variables(order.adapter) | _asked_variables(order.options)
    tokenizer = tokenizer_of(order.adapter, order.spec)
    derive(tokenizer, variables)  # before the slow part
    result = GGUF.write(replace(order, options=_of_gguf(order.options)))
    found = derive(tokenizer, variables, without=_left_to_ollama(order.folder / result["file"], tokenizer))
    stops = stop_tokens_of(tokenizer)
    text = modelfile(result["file"], found.text, stops, num_ctx)
    (order.folder / "Modelfile").write_text(text, encoding="utf-8")
    _say(found, stops)
    name = re.sub(r"[^a-z0-9._-]+", "-", order.output.name.lower()).strip("-._") or "model"
    return {
        **result,
        "verified": {**result["verified"], "conversations_equal": found.conversations},
        "notes": found.notes,
        "serve": f"ollama create {name} -f {shlex.quote(str(order.output / 'Modelfile'))} && ollama run {name}",
    }


def _left_to_ollama(gguf: Path, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What Ollama itself writes at the start."""
    return str(tokenizer.bos_token or "") if adds_bos(gguf) else ""


def _say(found: GoTemplate, stops: Sequence[str]) -> None:
    say(
        "Go template",
        f"equal to the chat template on {found.conversations} random conversations; replies end with "
        + ", ".join(stops),
    )


def _trained_variables(adapter: Path) -> dict[str, Any]:
    file = adapter / MANIFEST
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return dict(told.get("chat_template_kwargs", {}))


def _of_gguf(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in OWN_OPTIONS}


def _num_ctx(options: Mapping[str, Any]) -> int | None:
    told = options.get("num_ctx")
    if told is None:
        return None
    if not str(told).isdecimal() or int(told) < 1:
        raise SettingError(f"num_ctx {told!r} is no number of tokens; give one such as 8192")
    return int(told)


def _asked_variables(options: Mapping[str, Any]) -> dict[str, Any]:
    told = options.get("chat_template_kwargs") or {}
    try:
        told = yaml.safe_load(told) if isinstance(told, str) else told
    except yaml.YAMLError:
        told = None
    if not isinstance(told, dict):
        raise SettingError("chat_template_kwargs takes names and values, such as {date_string: 26 Jul 2024}")
    return told


OLLAMA = Target(
    name="ollama",
    help="A GGUF with a Modelfile whose template is proven to write what was trained.",
    refusals=ollama_refusals,
    write=_write,
    options={**GGUF.options, **OWN_OPTIONS},
    needs=GGUF.needs,
)
