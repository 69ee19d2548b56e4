"""A GGUF file and the adapter on its own base → proof in llama.cpp's runtime that both say the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_sft.console import say
from lora_sft.errors import VerificationError
from lora_sft.exporting.llama_cpp.runtime import LOWEST, Answers, Questions, ask, positions
from lora_sft.exporting.llama_cpp.types import Precision
from lora_sft.merging.fidelity import KEPT_SHARE, PROBES, ROUNDING, Fidelity, compare, logits_of
from lora_sft.model.base import BaseSpec
from lora_sft.model.loading import load_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 24
"""How far replies are compared."""

TEXTS = (
    "I'll say it's DON'T and we'Ve, 3 33 333 3333 33333, 3.14; a_b@c.de!!! ...?  two  spaces\n\n\n three\t\ttabs ",
    "Größe, naïve, Ελληνικά, привет, 你好，世界。, こんにちは, नमस्ते, 🚀🙂 (ok)",
    '{"a": [1, 2]} <b>x</b> #!/bin/sh\r\n  x = y*2;\n\n    return x  # 100%',
)
"""Cut into tokens beside the probes: what tells pre-tokenizers apart."""

MOST_NUMBERS = 5_000_000
"""Probabilities that are asked for: the server tells them as text, some 150 thousand a second."""

TIE = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.5}
"""By the arithmetic of the adapter: replies may part where it likes the other token less by this (in nats) at most."""


@dataclass(frozen=True)
class Reference:
    """What the adapter on its own base says, read off before it is freed.

    Attributes:
        questions: those that llama.cpp is asked as well.
        token_ids: of each text of the questions.
        rendered: each probe as text, ready for a reply; None where there is no chat template.
        logits: of each probe, (positions, vocabulary), float32.
        base_logits: without the adapter.
        replies: of each probe, greedily.
        reply_logits: of each token of a reply, (length, vocabulary).
        dtype: of the arithmetic.
        is_published: whether llama.cpp knows this very tokenizer, with what it leaves out in rare scripts.
        bos: the token with which a text begins; "" if there is none.
    """

    questions: Questions
    token_ids: list[list[int]]
    rendered: list[str | None]
    logits: list[Tensor]
    base_logits: list[Tensor]
    replies: list[list[int]]
    reply_logits: list[Tensor]
    dtype: str
    is_published: bool
    bos: str


@dataclass(frozen=True)
class Verified:
    """How the file compares.

    Attributes:
        fidelity: of the next-token distributions, over log probabilities.
        token_ids_equal: of all rendered conversations, and of the harder texts unless the tokenizer is a published one.
        odd_texts: those harder texts that llama.cpp cuts differently.
        replies_equal: of all probes; a near tie where they first part counts as equal.
        ties: replies that part at a near tie.
        template_equal: whether llama.cpp renders the probes as the training did.
        problems: what is beyond its bound, in words.
    """

    fidelity: Fidelity
    token_ids_equal: bool
    replies_equal: bool
    ties: int
    template_equal: bool
    odd_texts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_result(self) -> dict[str, Any]:
        """As it stands in the result of an export."""
        return {
            "max_abs_logit_diff": self.fidelity.max_abs_logit_diff,
            "mean_kl": self.fidelity.mean_kl,
            "max_kl": self.fidelity.max_kl,
            "top1_agreement": self.fidelity.top1_agreement,
            "adapter_effect": self.fidelity.adapter_effect,
            "token_ids_equal": self.token_ids_equal,
            "replies_equal": self.replies_equal,
            "replies_parting_at_a_tie": self.ties,
            "chat_template_equal": self.template_equal,
        }


def look_at(
    adapter: Path,
    spec: BaseSpec,
    stop_ids: Sequence[int],
    conversations: Sequence[Sequence[dict[str, Any]]] = (),
    is_published: bool = False,
) -> Reference:
    """Runs the adapter on its base.

    Args:
        stop_ids: tokens that end a reply.
        conversations: the probes; none takes the usual ones.
        is_published: whether llama.cpp knows this very tokenizer.
    """
    loaded = load_adapter(adapter, spec)
    asked = [list(conversation) for conversation in conversations] or [[dict(probe)] for probe in PROBES]
    rendered = [_render(loaded.tokenizer, conversation, loaded.template_variables) for conversation in asked]
    texts = [talk[0]["content"] if text is None else text for text, talk in zip(rendered, asked, strict=True)]
    texts += [*TEXTS]
    token_ids = [_ids(loaded.tokenizer, text, with_special=False) for text in texts]
    probes = [_ids(loaded.tokenizer, texts[at], with_special=text is None) for at, text in enumerate(rendered)]
    replies, reply_logits = _replies(loaded.model, probes, stop_ids)
    tensors = [torch.tensor([probe]) for probe in probes]
    logits = logits_of(loaded.model, tensors)
    stride = -(-sum(rows.numel() for rows in logits) // MOST_NUMBERS)
    with loaded.model.disable_adapter():
        base_logits = _thinned(logits_of(loaded.model, tensors), stride)
    talks = asked if loaded.tokenizer.chat_template is not None else []
    questions = Questions(texts, probes, probes, NEW_TOKENS, talks, list(stop_ids), stride)
    thinned, dtype = _thinned(logits, stride), spec.dtype
    found = (questions, token_ids, rendered, thinned, base_logits, replies, reply_logits)
    return Reference(*found, dtype, is_published, str(loaded.tokenizer.bos_token or ""))


def verify(file: Path, reference: Reference, precision: Precision, lora: Path | None = None) -> Verified:
    """Asks llama.cpp the same and compares.

    Raises:
        VerificationError: the file cannot be run, or is not the adapter.
    """
    found = judge(ask(file, reference.questions, lora), reference, precision)
    fidelity = found.fidelity
    say(
        "compared",
        f"in llama.cpp: mean KL {fidelity.mean_kl:.1e} (the adapter's own effect: {fidelity.adapter_effect:.1e}), "
        f"likeliest token the same at {fidelity.top1_agreement:.1%}, token ids "
        f"{'equal' if found.token_ids_equal else 'DIFFERENT'}, greedy replies "
        f"{'equal' if found.replies_equal else 'different'}"
        + (f" ({found.ties} part at a near tie)" if found.ties else ""),
    )
    if not found.template_equal:
        say(
            "chat template",
            "llama.cpp's template engine renders the probes differently (date, variables or an unknown construct): "
            "serve it with --chat-template-file, or send prompts that were rendered here",
        )
    if found.odd_texts and found.token_ids_equal:
        say(
            "token ids",
            f"llama.cpp is known to cut some scripts otherwise than this published tokenizer, such as in "
            f"{found.odd_texts[0][:40]!r}; the rendered conversations are cut alike",
        )
    if found.problems:
        raise VerificationError(f"{(lora or file).name} is not the adapter: {'; '.join(found.problems)}")
    return found


def judge(answers: Answers, reference: Reference, precision: Precision) -> Verified:
    """Compares what llama.cpp answered with what the adapter says."""
    problems = _vocabulary_problem(answers, reference)
    if problems:
        raise VerificationError(f"the file is not the adapter: {problems}")
    new = [torch.from_numpy(told) for told in answers.log_probabilities]
    fidelity = compare(new, _log(reference.logits), _log(reference.base_logits))
    wanted = [text for text in reference.rendered if text is not None]
    # llama.cpp takes a leading bos token off the text and puts it before the ids; chat_ids show that it comes once.
    template_equal = [told.removeprefix(reference.bos) for told in answers.rendered] == [
        text.removeprefix(reference.bos) for text in wanted
    ]
    own, talks = reference.token_ids, len(reference.rendered)
    odd = [reference.questions.texts[at] for at in range(talks, len(own)) if answers.token_ids[at] != own[at]]
    ids_equal = answers.token_ids[:talks] == own[:talks] and (reference.is_published or not odd)
    if template_equal and wanted:
        ids_equal = ids_equal and answers.chat_ids == reference.questions.probes
    partings = [
        _parting(told, own, logits)
        for told, own, logits in zip(answers.replies, reference.replies, reference.reply_logits, strict=True)
    ]
    tolerance = TIE[reference.dtype]
    result = Verified(
        fidelity,
        token_ids_equal=ids_equal,
        replies_equal=all(gap <= tolerance for gap in partings),
        ties=sum(0 < gap <= tolerance for gap in partings),
        template_equal=template_equal,
        odd_texts=odd,
    )
    return replace(result, problems=_problems(result, answers, reference, precision))


def _problems(found: Verified, answers: Answers, reference: Reference, precision: Precision) -> list[str]:
    """What does not hold, in words."""
    problems = []
    if not found.token_ids_equal:
        problems.append(_other_ids(answers, reference))
    if missing := [stop for stop in reference.questions.stop_ids if stop not in answers.stopping]:
        problems.append(f"llama.cpp would not end a reply at the stop token(s) with id {missing}")
    allowed = max(precision.mean_kl, ROUNDING[reference.dtype], KEPT_SHARE * found.fidelity.adapter_effect)
    if not found.fidelity.mean_kl <= allowed:
        problems.append(
            f"mean KL {found.fidelity.mean_kl:.2e} is more than {precision.name} may cost ({allowed:.2e}; the "
            f"adapter's own effect is {found.fidelity.adapter_effect:.2e})"
        )
    if precision.is_exact and not found.replies_equal:
        problems.append(f"greedy replies differ, and not at a near tie, though {precision.name} keeps the weights")
    return problems


def _other_ids(answers: Answers, reference: Reference) -> str:
    """The first text that llama.cpp cuts differently."""
    own = [*reference.token_ids, *reference.questions.probes]
    told = [*answers.token_ids, *answers.chat_ids]
    texts = [*reference.questions.texts, *(text or "" for text in reference.rendered)]
    at = next(i for i, ids in enumerate(told) if ids != own[i])
    first = next((i for i, (new, old) in enumerate(zip(told[at], own[at], strict=False)) if new != old), 0)
    return (
        f"llama.cpp cuts {texts[at][:60]!r} into other tokens from token {first} on "
        f"({told[at][first : first + 6]}, where the trained tokenizer makes {own[at][first : first + 6]}); name "
        "another pre-tokenizer of llama.cpp's with pre; a SentencePiece tokenizer needs its tokenizer.model in the base"
    )


def _vocabulary_problem(answers: Answers, reference: Reference) -> str:
    told, own = answers.log_probabilities[0].shape[-1], reference.logits[0].shape[-1]
    return f"it has {told} tokens, the model {own}" if told != own else ""


def _parting(told: Sequence[int], own: Sequence[int], logits: Tensor) -> float:
    """By how much the adapter prefers its own token where two replies first part, in nats; 0 if they do not."""
    for at, (new, old) in enumerate(zip(told, own, strict=False)):
        if new != old:
            return float(logits[at, old] - logits[at, new])
    return 0.0 if len(told) == len(own) else float("inf")


def _log(logits: Sequence[Tensor]) -> list[Tensor]:
    """Log probabilities, cut off where llama.cpp's are."""
    return [rows.double().log_softmax(-1).clamp(min=LOWEST).float() for rows in logits]


def _render(tokenizer: "PreTrainedTokenizerBase", talk: list[dict[str, Any]], variables: dict[str, Any]) -> str | None:
    """A conversation as text up to where the reply begins; None without a chat template."""
    if tokenizer.chat_template is None:
        return None
    text = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False, **variables)
    return str(text)


def _thinned(logits: Sequence[Tensor], stride: int) -> list[Tensor]:
    """The rows that llama.cpp is asked for as well."""
    return [rows[positions(len(rows), stride)] for rows in logits]


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, with_special: bool) -> list[int]:
    """Ids of a text; what a template wrote has its bos token already."""
    return [int(i) for i in tokenizer(text, add_special_tokens=with_special)["input_ids"]]


def _replies(
    model: Any, probes: Sequence[Sequence[int]], stop_ids: Sequence[int]
) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy replies with their logits."""
    replies, logits = [], []
    for probe in probes:
        ids = torch.tensor([list(probe)], device=model.device)
        told = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            output_logits=True,
            return_dict_in_generate=True,
        )
        replies.append([int(i) for i in told.sequences[0, len(probe) :]])
        logits.append(torch.cat(list(told.logits)).float().cpu())
    return replies, logits
