"""Names and values of other trainers → our settings, with a sentence for each thing that was translated.

A plain renaming is the `also` of a field in `config.py`; here stands what takes more than a new name.
"""

from collections.abc import Callable
from typing import Any

from lora_sft.config import RunConfig, other_names
from lora_sft.errors import SettingError

Settings = dict[str, Any]


def translate(given: Settings) -> tuple[Settings, list[str]]:
    """Settings as given → (settings under our names, what was translated, in words).

    Unknown names are left as they are; `settings.py` deals with them.

    Raises:
        SettingError: a value that we do not do, or one setting under two names.
    """
    renamed = other_names()
    ours: Settings = {}
    said: list[str] = []
    problems: list[str] = []
    for name, value in given.items():
        if name in MEANINGS:
            try:
                found = MEANINGS[name](value) if value is not None else {}
            except SettingError as error:
                problems.append(f"{name}: {error}")
                continue
            said.append(
                f"{name}: {value} is " + (", ".join(f"{k}: {v}" for k, v in found.items()) or "what happens anyway")
            )
        elif name in renamed:
            found = {renamed[name]: _value(renamed[name], value)}
            if name != "model":  # our own short form
                said.append(f"{name} is {renamed[name]} here")
        else:
            found = {name: _value(name, value)}
        for key, new in found.items():
            if key in ours and ours[key] != new:
                raise SettingError(f"{name}: {key} is given twice, as {ours[key]!r} and {new!r}; keep one")
            ours[key] = new
    if problems:
        raise SettingError.of(problems)
    return ours, said


def _value(name: str, value: Any) -> Any:
    """Values that others allow where we have a plainer one."""
    if value == "auto" and name in RunConfig.model_fields and RunConfig.model_fields[name].default is None:
        return None  # bf16: auto, load_in_4bit: auto: chosen by us when unset
    if name == "gradient_checkpointing" and value == "unsloth":
        return "offload"
    if name == "lora_target_modules" and value == "all":
        return "all-linear"
    if name == "report_to" and value in (None, [], ""):
        return ["none"]
    return value


def _only(allowed: dict[Any, Settings], why_not: str) -> Callable[[Any], Settings]:
    """A name with a few values that we know; any other value is refused with the reason."""

    def read(value: Any) -> Settings:
        key = value.lower() if isinstance(value, str) else value
        if key not in allowed:
            accepted = ", ".join(str(k).lower() if isinstance(k, bool) else str(k) for k in allowed)
            raise SettingError(f"{value!r} is not something we do: {why_not} (accepted: {accepted})")
        return allowed[key]

    return read


_REPLIES_ONLY = "the loss always falls on the assistant's words alone"
_DTYPES = {
    "bfloat16": {"bf16": True},
    "bf16": {"bf16": True},
    "float16": {"fp16": True},
    "fp16": {"fp16": True},
    "float32": {"bf16": False, "fp16": False},
    "fp32": {"bf16": False, "fp16": False},
    "auto": {},
}


_FLASH = {"attn_implementation": "flash_attention_2"}


# Axolotl's types of datasets → our layouts; None is found out.
_LAYOUTS = {None: None, "chat_template": None, "sharegpt": "sharegpt", "alpaca": "alpaca", "completion": "text"}


def _dataset_list(value: Any) -> Settings:
    """Axolotl's `datasets: [{path: …, type: chat_template}]`."""
    entries = [{"path": entry} if isinstance(entry, str) else entry for entry in _as_list(value)]
    sources = [_source(entry) for entry in entries]
    is_a_name = len(sources) == 1 and set(sources[0]) == {"path"}
    return {"dataset": sources[0]["path"] if is_a_name else sources}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _source(entry: Any) -> Settings:
    if not isinstance(entry, dict) or "path" not in entry:
        raise SettingError("an entry has a path")
    unknown = set(entry) - {"path", "type", "split"}
    if unknown:
        raise SettingError(f"{', '.join(sorted(unknown))} has no counterpart here; remove it")
    kind = entry.get("type")
    if not isinstance(kind, (str, type(None))) or kind not in _LAYOUTS:
        known = ", ".join(str(name) for name in _LAYOUTS if name)
        raise SettingError(f"type {kind!r} is not something we read (accepted: {known}); name the columns with columns")
    wishes = {"path": entry["path"], "split": entry.get("split"), "layout": _LAYOUTS[kind]}
    return {name: wish for name, wish in wishes.items() if wish is not None}


# A new name of another trainer that means more than a renaming: one line here.
MEANINGS: dict[str, Callable[[Any], Settings]] = {
    "adapter": _only({"lora": {"load_in_4bit": False}, "qlora": {"load_in_4bit": True}}, "we train LoRA adapters"),
    "finetuning_type": _only({"lora": {}}, "we train LoRA adapters"),
    "fine_tune_type": _only({"lora": {}, "dora": {"use_dora": True}}, "we train LoRA adapters"),
    "stage": _only({"sft": {}}, "we do supervised fine-tuning"),
    "do_train": _only({True: {}}, "train is what this command does"),
    "quantization_bit": _only(
        {4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}}, "bases are stored in 4, 8, 16 or 32 bits"
    ),
    "quantization_method": _only({"bnb": {}, "bitsandbytes": {}}, "we quantize with bitsandbytes"),
    "load_in_16bit": _only({True: {"load_in_4bit": False}, False: {}}, "give true or false"),
    "dtype": _only(_DTYPES, "give a floating-point type"),
    "torch_dtype": _only(_DTYPES, "give a floating-point type"),
    "lora_target_linear": _only({True: {"lora_target_modules": "all-linear"}, False: {}}, "give true or false"),
    "train_on_inputs": _only({False: {}}, _REPLIES_ONLY),
    "train_on_prompt": _only({False: {}}, _REPLIES_ONLY),
    "mask_prompt": _only({True: {}}, _REPLIES_ONLY),
    "assistant_only_loss": _only({True: {}}, _REPLIES_ONLY),
    "train_on_responses_only": _only({True: {}}, _REPLIES_ONLY),
    "mask_history": _only({True: {"turns": "last"}, False: {}}, "give true or false"),
    "train_on_eos": _only({"turn": {}}, "every reply is learned through its stop token, and no other's"),
    "group_by_length": _only(
        {True: {"train_sampling_strategy": "group_by_length"}, False: {"train_sampling_strategy": "random"}},
        "give true or false",
    ),
    "excess_length_strategy": _only(
        {"drop": {"truncation": "drop"}, "truncate": {"truncation": "cut"}, "raise": {"truncation": "error"}},
        "rows are dropped, cut or refused",
    ),
    "validation_split_percentage": lambda value: {"eval_size": float(value) / 100},
    "flash_attn": _only(
        {True: _FLASH, "fa2": _FLASH, "sdpa": {"attn_implementation": "sdpa"}, "auto": {}, False: {}, "disabled": {}},
        "name a kernel with attn_implementation",
    ),
    "flash_attention": _only({True: _FLASH, False: {}}, "name a kernel with attn_implementation"),
    "bias": lambda value: {"lora_config": {"bias": value}},
    "lora_bias": lambda value: {"lora_config": {"bias": value}},
    "datasets": _dataset_list,
    "overwrite_output_dir": _only({False: {}}, "an output folder in use is never overwritten; name another"),
}
