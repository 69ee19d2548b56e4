"""Mappings, YAML files and command-line words → one RunConfig, and a RunConfig → YAML."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from math import isinf
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lora_sft.config import RunConfig, other_names, sections
from lora_sft.console import say
from lora_sft.dialect import MEANINGS, translate
from lora_sft.errors import SettingError

# Arguments of TRL's SFTConfig that are not passed on, and why.
_OTHER_SETTING = "there is a setting of ours for it"
_OUR_LOSS = "the loss is the plain mean over supervised tokens"
_OUR_DATA = "the rows are prepared before the trainer sees them"
_NO_HUB = "`lora-sft export hub` uploads the finished adapter"
_OUR_BATCHES = "micro-batches are planned by us: use train_sampling_strategy, packing and seed"
NOT_PASSED_ON = {
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "disable_tqdm", "remove_unused_columns"), _OUR_DATA),
    **dict.fromkeys(("use_cpu", "no_cuda"), "use device: cpu"),
    **dict.fromkeys(
        ("packing", "eval_packing", "padding_free", "dataset_text_field", "completion_only_loss"), _OUR_DATA
    ),
    **dict.fromkeys(("dataloader_drop_last", "accelerator_config", "length_column_name", "data_seed"), _OUR_BATCHES),
    **dict.fromkeys(("loss_type", "compute_loss_func", "label_names"), _OUR_LOSS),
    **dict.fromkeys(("activation_checkpointing",), "use gradient_checkpointing"),
    **dict.fromkeys(("push_to_hub", "push_to_hub_token", "hub_token", "hub_model_id", "hub_strategy"), _NO_HUB),
    **dict.fromkeys(("hub_private_repo", "hub_always_push", "hub_revision"), _NO_HUB),
}


def resolve(*layers: Mapping[str, Any]) -> RunConfig:
    """Settings from several places, a later one winning over an earlier → RunConfig.

    What was translated from another trainer's words is said on the console.

    Raises:
        SettingError: names everything that is wrong, at once.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        _refuse_twice_named(layer)
        ours, said = translate(
            {_name(key): str(value) if isinstance(value, Path) else value for key, value in layer.items()}
        )
        for words in said:
            say("setting", words)
        _claim_unknown(ours)
        for name, value in ours.items():
            # What a layer says inside a mapping is added to what an earlier one said.
            both = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = {**merged[name], **value} if both else value
    _refuse_what_is_ours(merged)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise SettingError.of([_sentence(problem, merged) for problem in error.errors()]) from None


def _name(written: str) -> str:
    return written.replace("-", "_")


def _refuse_twice_named(layer: Mapping[str, Any]) -> None:
    """`learning-rate` and `learning_rate` in one place: one would win in silence."""
    written: dict[str, str] = {}
    for key in layer:
        if (other := written.setdefault(_name(key), key)) != key:
            raise SettingError(f"{other} and {key} are one setting; keep one of them")


def _claim_unknown(ours: dict[str, Any]) -> None:
    """Moves the names that only TrainingArguments knows into `training_args`; refuses those that nobody knows."""
    for name in [name for name, value in ours.items() if value is None and name not in RunConfig.model_fields]:
        say("setting", f"{name} is empty, and left out")
        del ours[name]
    unknown = [name for name in ours if name not in RunConfig.model_fields]
    theirs = _training_arguments() | set(NOT_PASSED_ON) if unknown else frozenset()
    if strangers := [name for name in unknown if name not in theirs]:
        raise SettingError.of([f'unknown setting "{name}"{_nearest(name)}' for name in strangers])
    for name in unknown:
        ours["training_args"] = {**(ours.get("training_args") or {}), name: ours.pop(name)}
        if name not in NOT_PASSED_ON:
            say("setting", f"{name} is passed on to TrainingArguments")


def _refuse_what_is_ours(settings: Mapping[str, Any]) -> None:
    """Arguments of the trainer that would have no effect, or another one than their name says."""
    given = settings.get("training_args")
    names = given if isinstance(given, dict) else {}
    problems = [f"{name}: {why}" for name, why in NOT_PASSED_ON.items() if name in names]
    problems += [f"training_args.{name}: {_OTHER_SETTING}, {name}" for name in names if name in RunConfig.model_fields]
    endless = [name for name, value in {**names, **settings}.items() if isinstance(value, float) and isinf(value)]
    problems += [f"{name}: {settings.get(name, names.get(name))} is no number to compute with" for name in endless]
    if problems:
        raise SettingError.of(problems)


@cache
def _training_arguments() -> frozenset[str]:
    """The names of transformers.TrainingArguments, read from its source: importing it would import torch."""
    import ast
    import importlib.util

    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        return frozenset()
    tree = ast.parse(Path(package.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    fields = (
        statement
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
        for statement in node.body
    )
    return frozenset(
        field.target.id for field in fields if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def _nearest(name: str) -> str:
    import difflib

    names = [*RunConfig.model_fields, *other_names(), *MEANINGS]
    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]}?" if found else "; `lora-sft schema` lists them all"


def _sentence(problem: Any, given: Mapping[str, Any]) -> str:
    """pydantic's account of one problem → `max_length: -5: input should be greater than or equal to 2`."""
    words = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return words
    name = str(problem["loc"][0])
    inside = ".".join(
        str(part) for part in problem["loc"][1:] if not str(part).startswith(("list[", "constrained", "function-"))
    )
    where = f" (at {inside})" if inside and not inside.isidentifier() else ""
    return f"{name}: {given.get(name)!r}: {words[0].lower()}{words[1:]}{where}"


# --- command-line words -------------------------------------------------------------------------------


def from_words(words: Sequence[str]) -> dict[str, Any]:
    """`--learning-rate 2e-4 --no-bf16 seed=7` → {"learning_rate": 0.0002, "bf16": False, "seed": 7}.

    Raises:
        SettingError: a word that is neither a setting nor the value of one.
    """
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") and not re.match(r"[A-Za-z_][\w.-]*=", word):
            raise SettingError(f'"{word}" is no setting; write --name value or name=value')
        name, has_value, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if has_value:
            _put(found, name, value)
        elif name.startswith("no_") and name not in RunConfig.model_fields:
            _put(found, name.removeprefix("no_"), "false")
        elif rest and not rest[0].startswith("--") and (not _is_switch(name) or _is_value(name, rest[0])):
            _put(found, name, rest.pop(0))
        elif _is_switch(name) or name in MEANINGS:
            _put(found, name, "true")
        else:
            raise SettingError(f"--{name.replace('_', '-')} needs a value")
    return found


def _is_switch(name: str) -> bool:
    """Whether the setting is a boolean, or may be one, so that its bare name means yes."""
    return bool in _choices(name)


def _choices(name: str) -> tuple[Any, ...]:
    """Types and words that a setting may be; none if there is no such setting."""
    field = RunConfig.model_fields.get(other_names().get(name, name))
    if field is None:
        return ()
    parts = [
        get_args(part)[0] if get_origin(part) is Annotated else part
        for part in get_args(field.annotation) or (field.annotation,)
    ]
    return tuple(choice for part in parts for choice in (get_args(part) if get_origin(part) is Literal else (part,)))


def _is_value(name: str, word: str) -> bool:
    """Whether the word behind a switch belongs to it."""
    choices = _choices(name)
    return (
        isinstance(read_yaml(word), bool)
        or word.lower() in ("auto", "none", "null")
        or word in choices
        or str in choices
        or (int in choices and word.isdecimal())
    )


def _put(found: dict[str, Any], name: str, text: str) -> None:
    """Sets `name`, or for `training_args.adam_beta2` the key inside it."""
    field, _, key = name.partition(".")
    field = other_names().get(field, field)
    known = RunConfig.model_fields.get(field)
    # Names and paths stay text: a folder called 007 is not the number 7, and [THINK] is no list.
    plain_text = known is not None and "str" in str(known.annotation) and "dict" not in str(known.annotation)
    if plain_text:
        value = None if text.lower() in ("none", "null") and field != "report_to" else text
    else:
        value = read_yaml(text)
    if key:
        if not isinstance(found.setdefault(field, {}), dict):
            raise SettingError(f"{name}: {field} has the value {found[field]!r}, and so no {key} in it")
        found[field][key] = value
    else:
        found[name] = value


# --- YAML -----------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `2e-4` is a number, and a key that stands twice is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:(?:\d[\d_]*\.\d*|\.\d+|\d[\d_]*)(?:[eE][-+]?\d+)|\d[\d_]*\.\d*|\.\d+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _unique_keys(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, (str, int, float, bool)):
            raise yaml.MarkedYAMLError(problem="a name must be a word", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"{key} stands twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_keys)


YAML_BYTES, YAML_NODES = 2**20, 100_000
"""The largest file of settings, and the values that it may stand for when every alias is written out."""

BROKEN = (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError, LookupError, AttributeError)
"""What broken YAML raises: PyYAML leaves `!!int x`, a number of 5,000 digits and a list as a key to Python."""


def read_yaml(text: str) -> Any:
    """YAML text → plain values; text that is no YAML stays text."""
    try:
        return _load(text)
    except BROKEN:
        return text


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values_in(node, {}) > YAML_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"its aliases stand for more than {YAML_NODES:,} values", problem_mark=node.start_mark
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node is when every alias in it is written out."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = YAML_NODES + 1  # of one that holds itself
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_values_in(part, known) for part in parts)
    return known[id(node)]


def read_file(path: str | Path) -> dict[str, Any]:
    """A YAML file of settings → mapping. Paths in it are relative to where the command runs.

    Raises:
        SettingError: no such file, broken YAML (with line and column), or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingError(f"{path}: no such file; `lora-sft init {path}` writes one")
    if path.stat().st_size > YAML_BYTES:
        raise SettingError(f"{path}: has {path.stat().st_size:,} bytes; settings take no more than {YAML_BYTES:,}")
    try:
        settings = _load(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise SettingError(f"{path}: brackets stand in brackets too deep to be settings") from None
    except BROKEN as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise SettingError(f"{path}{where}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(settings, dict):
        raise SettingError(
            f"{path}: holds {type(settings).__name__}, not `name: value` lines; `lora-sft init` shows the form"
        )
    return {str(name): value for name, value in settings.items()}


def to_yaml(config: RunConfig, *notes: str) -> str:
    """Every setting with its value, in reading order; `notes` become comments at the top."""
    lines = [f"# {note}" for note in notes]
    for title, fields in sections():
        lines += ["", f"# {title}"]
        lines += [_line(name, _plain(getattr(config, name))) for name in fields]
    return "\n".join(lines).lstrip("\n") + "\n"


def commented_yaml() -> str:
    """The file that `lora-sft init` writes: the settings a first run needs, and all others as comments."""
    lines = ["# Settings of a run: `lora-sft train THIS_FILE`. A line that is commented out shows the default."]
    for title, fields in sections():
        lines += ["", f"# --- {title} ---"]
        for name, field in fields.items():
            lines += ["", f"# {field.description}"]
            lines.append(FIRST_NEEDED.get(name, f"# {_line(name, field.default)}"))
    return "\n".join(lines) + "\n"


FIRST_NEEDED = {
    "model_name_or_path": "model_name_or_path: path/or/hub-name",
    "dataset": "dataset: conversations.jsonl",
    "output_dir": "output_dir: runs/first",
}


def _plain(value: Any) -> Any:
    """A value as it stands in a file; of a source what was said of it."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value


def _line(name: str, value: Any) -> str:
    """One `name: value` line of YAML, lists and mappings in their bracketed form."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=100_000)
    return f"{name}: {text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"
