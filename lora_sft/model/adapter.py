"""Settings and a base model → the model with its LoRA adapter; every name in the settings must match something."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lora_sft.config import RunConfig
from lora_sft.console import say
from lora_sft.errors import ModelError
from lora_sft.model.base import grow_vocabulary
from lora_sft.model.foreign import refuse_slow_patterns

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def lora_config(config: RunConfig, new_token_ids: Sequence[int], model: "PreTrainedModel") -> "LoraConfig":
    """Settings → PEFT's LoraConfig.

    Args:
        new_token_ids: rows of the embeddings to train.
        model: the base or its skeleton; tells what the embeddings are called.

    Raises:
        ModelError: PEFT does not accept the settings.
    """
    from peft import EvaConfig, LoraConfig

    starts: dict[str, Any] = {"default": True, "loftq": True}  # LoftQ sets the weights after attaching
    given = dict(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        target_parameters=config.lora_target_parameters,
        rank_pattern=dict(config.lora_rank_pattern),
        alpha_pattern=dict(config.lora_alpha_pattern),
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=starts.get(config.lora_init, config.lora_init),
        trainable_token_indices=_token_rows(model, new_token_ids),
    )
    if config.lora_init == "eva":
        given["eva_config"] = EvaConfig()
    try:
        return LoraConfig(**(given | config.lora_config))
    except (TypeError, ValueError) as error:
        raise ModelError(f"the adapter settings do not go together: {error}") from None


def _token_rows(model: "PreTrainedModel", token_ids: Sequence[int]) -> dict[str, list[int]] | None:
    """Which rows of which modules are trained for new tokens: of the embeddings, and of the head where it is its "
    "own."""
    if not token_ids:
        return None
    modules = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        modules.append(model.get_output_embeddings())
    return {
        name.rpartition(".")[2]: list(token_ids)
        for name, module in model.named_modules()
        if any(module is one for one in modules)
    }


def check_targets(config: RunConfig, model: "PreTrainedModel") -> None:
    """Every name in the adapter settings must match a module or parameter of the model.

    Raises:
        ModelError: lists every name that matches nothing, and what there is.
    """
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "lm_head")
    problems = []
    targets = config.lora_target_modules
    written = {"target_modules": targets, "rank_pattern": config.lora_rank_pattern} | config.lora_config
    written |= {"alpha_pattern": config.lora_alpha_pattern, "modules_to_save": config.lora_modules_to_save}
    refuse_slow_patterns(written, [*modules, *parameters], "adapter settings")
    if isinstance(targets, str) and targets != "all-linear" and not _matches_whole(targets, modules):
        problems.append(
            f"lora_target_modules: the regex {targets} matches no module; it must match a full name such as "
            f"{modules[-3]}"
        )
    for setting, names, there in (
        ("lora_target_modules", targets if isinstance(targets, list) else [], modules),
        ("lora_target_parameters", config.lora_target_parameters or [], parameters),
        ("lora_modules_to_save", config.lora_modules_to_save or [], modules),
    ):
        problems += [
            f"{setting}: {name} matches nothing in this model{_nearest(name, there)}"
            for name in names
            if not _matches_end(name, there)
        ]
    for setting, pattern in (
        ("lora_rank_pattern", config.lora_rank_pattern),
        ("lora_alpha_pattern", config.lora_alpha_pattern),
    ):
        problems += [
            f"{setting}: {key} matches nothing in this model"
            for key in pattern
            if not _matches_whole(rf"(.*\.)?({key})", [*modules, *parameters])
        ]
    if (isinstance(targets, list) and _matches_end(head, targets)) or (
        targets != "all-linear" and isinstance(targets, str) and _matches_whole(targets, [head])
    ):
        problems.append(
            "lora_target_modules: TRL trains no LoRA on the output layer; train it whole with lora_modules_to_save: "
            f"[{head}]"
        )
    if problems:
        raise ModelError.of(problems)


def _matches_end(name: str, there: Iterable[str]) -> bool:
    return any(full == name or full.endswith(f".{name}") for full in there)


def _matches_whole(pattern: str, there: Iterable[str]) -> bool:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ModelError(f"{pattern} is no regex: {error}") from None
    return any(compiled.fullmatch(name) for name in there)


def _nearest(name: str, there: Sequence[str]) -> str:
    import difflib

    ends = list(dict.fromkeys(full.rpartition(".")[2] for full in there if not full.rpartition(".")[2].isdigit()))
    found = difflib.get_close_matches(name.rpartition(".")[2], ends, n=1)
    return f"; did you mean {found[0]}?" if found else f"; it has {', '.join(ends)}"


def build_model(base: "PreTrainedModel", settings: "LoraConfig", seed: int, tokens: int | None = None) -> "PeftModel":
    """A base, or its outline without storage → what is trained: with rows for all tokens, and a fresh adapter.

    Args:
        tokens: that the tokenizer knows; None: as many as the base.

    Raises:
        ModelError: PEFT cannot adapt what was asked for.
    """
    from transformers import set_seed

    set_seed(seed)  # the rows of new tokens are drawn
    if tokens is not None:
        grow_vocabulary(base, tokens)
    return attach(base, settings, seed)


def attach(model: "PreTrainedModel", settings: "LoraConfig", seed: int) -> "PeftModel":
    """Adds a fresh adapter; the same seed gives the same start. The adapter's weights are float32.

    Raises:
        ModelError: PEFT cannot adapt what was asked for.
    """
    import torch
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(seed)
    try:
        # EVA fills the weights itself; until then they need no memory, as those of an outline.
        has_none = settings.init_lora_weights == "eva" or model.device.type == "meta"
        adapted = get_peft_model(model, settings, low_cpu_mem_usage=has_none)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"the adapter cannot be attached: {error}") from None
    set_dtype(adapted, torch.float32)
    return adapted


def set_dtype(model: "PeftModel", dtype: "torch.dtype") -> None:
    """Casts what is trained besides LoRA matrices (PEFT keeps those in float32): whole modules, biases, new tokens."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def train_in(model: "PeftModel", dtype: str, learning_rate: float) -> None:
    """Casts the LoRA matrices to the dtype that they are trained in; for bfloat16 it says what that costs.

    What steps are too small for is never cast: DoRA's magnitudes, new tokens, whole modules, biases.

    Args:
        dtype: `float32` or `bfloat16`.
        learning_rate: at its peak; about the size of AdamW's steps.
    """
    if dtype != "bfloat16":
        return
    matrices = cast_matrices(model)
    filled = [parameter for parameter in matrices if parameter.any()]
    stuck = sum(too_coarse(parameter, learning_rate) for parameter in filled)
    count = sum(parameter.numel() for parameter in filled)
    saved = 2 * sum(parameter.numel() for parameter in matrices)
    say(
        "adapter",
        f"bfloat16 (asked for) saves {saved / 2**20:.1f} MiB of weights; {stuck / max(count, 1):.0%} of those that are "
        f"not 0 are so large that a step of {learning_rate:g} rounds to nothing",
    )


def cast_matrices(model: "PeftModel") -> "list[torch.Tensor]":
    """Casts the LoRA matrices to bfloat16 → them."""
    import torch

    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" in name and "magnitude" not in name
    ]
    for parameter in matrices:
        parameter.data = parameter.data.to(torch.bfloat16)
    return matrices


def too_coarse(weights: "torch.Tensor", step: float) -> int:
    """How many bfloat16 numbers stay what they are if a step of this size is added to them.

    Between 2^e and 2^(e+1) they lie 2^(e-7) apart, and half of that is rounded away.
    """
    import torch

    exponents = torch.frexp(weights.detach().float()).exponent - 1  # of numbers in [1, 2) · 2^e
    half_way = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents - 8)
    return int(((half_way > step) & (weights != 0)).sum())


def describe_trained(model: "PeftModel") -> str:
    """`1,234,567 of 89,000,000 parameters (1.39 %) in q_proj ×2, k_proj ×2, …`"""
    trained, total = count_parameters(model)
    modules = {adapted_module(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = Counter(module.rpartition(".")[2] for module in sorted(modules))
    return f"{trained:,} of {total:,} parameters ({trained / total:.2%}) in " + ", ".join(
        f"{kind} ×{count}" for kind, count in kinds.items()
    )


def adapted_module(parameter: str) -> str:
    """`….layers.0.self_attn.q_proj.lora_A.default.weight` → `….layers.0.self_attn.q_proj`."""
    return re.split(r"\.(?:base_layer\.)*(?:lora_|modules_to_save|token_adapter|trainable_tokens)", parameter)[
        0
    ].removesuffix(".weight")


def count_parameters(model: "PeftModel") -> tuple[int, int]:
    """(trained, all); a 4-bit weight counts as the numbers that it stands for."""
    trained, total = model.get_nb_trainable_parameters()
    return int(trained), int(total)
