"""An adapter folder → a whole model in plain transformers form, compared with the adapter before it is called done.

The update is added in float32 to the base weights as they were in training: of a quantized base, to what the
quantized weights stand for. The result is written beside its final place, read back, and compared.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_sft.console import say
from lora_sft.data.conversation import Message
from lora_sft.errors import OutputError, SettingError, VerificationError
from lora_sft.model.base import BaseSpec, load_base
from lora_sft.model.device import peak_bytes
from lora_sft.model.loading import load_adapter, put_adapter, trained_base

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

DTYPES = ("auto", "bfloat16", "float16", "float32")

PROBES: tuple[Message, ...] = (
    {"role": "user", "content": "Who are you, and what can you do for me?"},
    {"role": "user", "content": "Explain in two sentences why the sky is blue."},
    {"role": "user", "content": "Write a short list: three things to pack for a trip, with a reason for each."},
    {"role": "user", "content": "2 + 2 = ? Answer with a number. Und nun auf Deutsch, bitte."},
)

KEPT_SHARE = 0.1
"""A merge may lose at most this share of what the adapter changed (in mean KL), or ROUNDING if that is more."""
ROUNDING = 1e-3


@dataclass(frozen=True)
class Fidelity:
    """How far a merged model is from the adapter on its own base, over the next-token distributions of the probes.

    Attributes:
        max_abs_logit_diff: largest difference of a logit.
        mean_kl: KL divergence from the adapter's distribution, in nats a position.
        top1_agreement: share of the positions with the same likeliest token.
        adapter_effect: mean KL between the adapter and its bare base, to measure the others against.
    """

    max_abs_logit_diff: float
    mean_kl: float
    top1_agreement: float
    adapter_effect: float

    @property
    def holds(self) -> bool:
        """Whether the merged model is the adapter, up to rounding."""
        return self.mean_kl <= max(KEPT_SHARE * self.adapter_effect, ROUNDING)


@dataclass(frozen=True)
class Trained:
    """What the merge must reproduce, read off the adapter on its base before that is freed.

    Attributes:
        adapter_logits, base_logits: of each probe, with and without the adapter; (length, vocabulary) each.
        quantized: {module: the weight that its quantized weight stands for}; emptied while it is written.
    """

    tokenizer: "PreTrainedTokenizerBase"
    generation_config: "GenerationConfig"
    probes: list[Tensor]
    adapter_logits: list[Tensor]
    base_logits: list[Tensor]
    quantized: dict[str, Tensor]


def merge(
    adapter: str | Path,
    output: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merges an adapter into its base.

    Args:
        adapter: the adapter folder.
        output: the folder of the merged model; must not exist yet, or be empty.
        dtype: of the written weights: bfloat16, float16 or float32; auto takes that of the training.
        device: where the adapter runs on its base; the merged model is summed up and read back on the CPU.
        trust_remote_code: run Python code that comes with the base.

    Returns:
        {"output_dir", "base", "dtype", "verified", "peak_rss_bytes", "seconds"}

    Raises:
        ModelError: no adapter there, or its base cannot be had.
        OutputError: the output folder holds something.
        VerificationError: the merged model differs from the adapter; it is kept under a name that says so.
    """
    clock = time.perf_counter()
    adapter, output = Path(adapter), Path(output).expanduser().absolute()
    if dtype not in DTYPES:
        raise SettingError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists already; name another folder for the merged model")
    spec = trained_base(adapter, device, trust_remote_code)
    dtype = spec.dtype if dtype == "auto" else dtype
    say("merge", f"onto the base as trained ({spec.quantization or spec.dtype}), summed in float32, written as {dtype}")

    staged = _stage(output)
    try:
        trained = _look_at(adapter, spec)
        _write(spec, adapter, trained, dtype, staged)
        fidelity = compare(_read_back(staged, spec, trained.probes), trained.adapter_logits, trained.base_logits)
        _settle(staged, output, fidelity)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return {
        "output_dir": str(output),
        "base": spec.name,
        "dtype": dtype,
        "verified": asdict(fidelity),
        "peak_rss_bytes": peak_bytes("cpu"),
        "seconds": round(time.perf_counter() - clock, 1),
    }


def _stage(output: Path) -> Path:
    """An empty folder beside the final one; the result moves to its name only when it is whole and holds."""
    staged = output.with_name(f".{output.name}.part")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror}") from None
    return staged


def _settle(staged: Path, output: Path, fidelity: Fidelity) -> None:
    """Gives the result its final name, or, where it is not the adapter, one that says so."""
    if not fidelity.holds:
        refused = output.with_name(f"{output.name}.refused")
        shutil.rmtree(refused, ignore_errors=True)
        staged.rename(refused)
        raise VerificationError(
            f"the merged model is not the adapter: mean KL {fidelity.mean_kl:.2e}, where the adapter's own effect is "
            f"{fidelity.adapter_effect:.2e}; kept as {refused}"
        )
    if output.is_dir():
        output.rmdir()
    staged.rename(output)


def _look_at(adapter: Path, spec: BaseSpec) -> Trained:
    """Loads the adapter on its base as trained, and reads off what the merge needs."""
    loaded = load_adapter(adapter, spec)
    probes = [_tokens(loaded.tokenizer, probe) for probe in PROBES]
    adapter_logits = _logits(loaded.model, probes)
    with loaded.model.disable_adapter():
        base_logits = _logits(loaded.model, probes)
    quantized = dequantized_weights(loaded.model)
    return Trained(loaded.tokenizer, loaded.model.generation_config, probes, adapter_logits, base_logits, quantized)


def _write(spec: BaseSpec, adapter: Path, trained: Trained, dtype: str, folder: Path) -> None:
    """Base as trained + update, in float32 on the CPU → `folder`, as safetensors of `dtype`."""
    base = load_base(replace(spec, quantization=None, device="cpu")).float()
    with torch.no_grad():
        for name in list(trained.quantized):
            module, weight = base.get_submodule(name), trained.quantized.pop(name)
            module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)  # GPT-2 keeps (inputs, outputs)
    model = put_adapter(base, adapter, len(trained.tokenizer)).merge_and_unload(safe_merge=True)
    model = model.to(getattr(torch, dtype))
    model.generation_config = trained.generation_config
    model.save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)


def _read_back(folder: Path, spec: BaseSpec, probes: Sequence[Tensor]) -> list[Tensor]:
    """Logits of what was written, computed in float32 on the CPU."""
    written = BaseSpec(str(folder), trust_remote_code=spec.trust_remote_code)
    return _logits(load_base(written).eval(), probes)


def dequantized_weights(model: Any) -> dict[str, Tensor]:
    """{module name in the plain model: the weight that its quantized weight stands for}, on the CPU."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): dequantize_bnb_weight(
            module.weight, getattr(module, "state", None)
        )
        .detach()
        .cpu()
        for name, module in model.named_modules()
        if isinstance(module, (Linear4bit, Linear8bitLt))
    }


def compare(merged: Sequence[Tensor], adapter: Sequence[Tensor], base: Sequence[Tensor]) -> Fidelity:
    """Logits of the probes, (length, vocabulary) each → how far the merged model is from the adapter."""
    new, old, bare = torch.cat(list(merged)), torch.cat(list(adapter)), torch.cat(list(base))
    return Fidelity(
        max_abs_logit_diff=(new - old).abs().max().item(),
        mean_kl=_mean_kl(new, old),
        top1_agreement=(new.argmax(-1) == old.argmax(-1)).float().mean().item(),
        adapter_effect=_mean_kl(bare, old),
    )


def _mean_kl(logits: Tensor, reference: Tensor) -> float:
    """Mean over positions of KL(reference ‖ logits), in nats; computed in float64."""
    return F.kl_div(
        logits.double().log_softmax(-1), reference.double().log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()


def _tokens(tokenizer: "PreTrainedTokenizerBase", message: Message) -> Tensor:
    """A probe as token ids, (1, length); as plain text where there is no chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(message["content"], return_tensors="pt")["input_ids"]  # type: ignore[no-any-return]
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return prompt["input_ids"]  # type: ignore[no-any-return]


def _logits(model: Any, probes: Sequence[Tensor]) -> list[Tensor]:
    """Logits of each probe in float32 on the CPU, (length, vocabulary)."""
    with torch.inference_mode():
        return [model(input_ids=probe.to(model.device), use_cache=False).logits[0].float().cpu() for probe in probes]
