"""Next-token distributions of a merged model and of its adapter → how far they are apart, and whether that holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_sft.chat.rendering import prompt_text
from lora_sft.data.conversation import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES: tuple[Message, ...] = (
    {"role": "user", "content": "Who are you, and what can you do for me?"},
    {"role": "user", "content": "Explain in two sentences why the sky is blue."},
    {"role": "user", "content": "Write a short list: three things to pack for a trip, with a reason for each."},
    {"role": "user", "content": "2 + 2 = ? Answer with a number. Und nun auf Deutsch, bitte."},
)

KEPT_SHARE = 0.05
"""A result may lose at most this share of what the adapter changed (in mean KL), or ROUNDING if that is more."""
ROUNDING = {"float32": 1e-5, "float16": 1e-4, "bfloat16": 1e-3}
"""Mean KL in nats that the rounding of weights and of arithmetic explains, by the coarser of their dtypes."""


@dataclass(frozen=True)
class Fidelity:
    """How far a result is from the adapter on its own base, over the next-token distributions of the probes.

    Attributes:
        max_abs_logit_diff: largest difference of a logit.
        mean_kl, max_kl: KL divergence from the adapter's distribution, in nats a position.
        top1_agreement: share of the positions with the same likeliest token.
        adapter_effect: mean KL between the adapter and its bare base, to measure the others against.
    """

    max_abs_logit_diff: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    adapter_effect: float

    @property
    def share_lost(self) -> float:
        """Mean KL as a share of the adapter's own effect."""
        return self.mean_kl / self.adapter_effect if self.adapter_effect > 0 else 0.0

    def holds(self, dtype: str = "bfloat16") -> bool:
        """Whether the result is the adapter, up to the rounding of a dtype."""
        return self.mean_kl <= max(KEPT_SHARE * self.adapter_effect, ROUNDING[dtype])

    def __str__(self) -> str:
        return (
            f"mean KL {self.mean_kl:.1e}, at most {self.max_kl:.1e} (the adapter's own effect: "
            f"{self.adapter_effect:.1e}, of which {self.share_lost:.2%} is lost), largest logit difference "
            f"{self.max_abs_logit_diff:.1e}, same first choice at {self.top1_agreement:.1%} of positions"
        )


def compare(new: Sequence[Tensor], adapter: Sequence[Tensor], base: Sequence[Tensor]) -> Fidelity:
    """Logits of the probes, (length, vocabulary) each → how far `new` is from the adapter."""
    each = [_kl(one, old) for one, old in zip(new, adapter, strict=True)]
    kl = torch.cat(each)
    same = [one.argmax(-1) == old.argmax(-1) for one, old in zip(new, adapter, strict=True)]
    return Fidelity(
        max_abs_logit_diff=max((one - old).abs().max().item() for one, old in zip(new, adapter, strict=True)),
        mean_kl=kl.mean().item(),
        max_kl=kl.max().item(),
        top1_agreement=torch.cat(same).float().mean().item(),
        adapter_effect=torch.cat([_kl(one, old) for one, old in zip(base, adapter, strict=True)]).mean().item(),
    )


def _kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference ‖ logits) at each position, in nats; computed in float64, and no less than 0."""
    apart = F.kl_div(
        logits.double().log_softmax(-1), reference.double().log_softmax(-1), log_target=True, reduction="none"
    )
    return apart.sum(-1).clamp(min=0)


def probes_of(tokenizer: "PreTrainedTokenizerBase") -> list[Tensor]:
    """The probes as token ids, (1, length) each; as plain text where there is no chat template."""
    return [_tokens(tokenizer, probe) for probe in PROBES]


def _tokens(tokenizer: "PreTrainedTokenizerBase", message: Message) -> Tensor:
    if tokenizer.chat_template is None:
        return tokenizer(message["content"], return_tensors="pt")["input_ids"]  # type: ignore[no-any-return]
    text = prompt_text([message], tokenizer)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]  # type: ignore[no-any-return]


def logits_of(model: Any, probes: Sequence[Tensor]) -> list[Tensor]:
    """Logits of each probe in float32 on the CPU, (length, vocabulary)."""
    with torch.inference_mode():
        return [model(input_ids=probe.to(model.device), use_cache=False).logits[0].float().cpu() for probe in probes]
