"""Which part of which parameter each tensor on disk is; as transformers says that loads them.

Since version 5 transformers keeps some weights otherwise than their files do: the matrices of all experts are one
parameter. A merged model is written in the form of its base's files, so each file tensor needs to know its place.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_sft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a file's tensor lies in a parameter.

    Attributes:
        parameter: its name in the model.
        matrix: which one of a stack; None: the whole stack, or there is one only.
        first_row: of that matrix.
        turned: whether the file has rows and columns the other way round.
        obstacle: why the place cannot be told; such a tensor can be copied, not edited.
    """

    parameter: str
    matrix: int | None = None
    first_row: int = 0
    turned: bool = False
    obstacle: str | None = None


def places(stored: Mapping[str, Shape], skeleton: "PreTrainedModel") -> dict[str, Place]:
    """{name in the files: its place}; tensors that the model does not use have none.

    Args:
        stored: {name: shape} in the files.
        skeleton: the model without storage.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    parameters = skeleton.state_dict()
    found: dict[str, Place] = {}
    groups: dict[tuple[str, int], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(
            name, renamings, converters, skeleton.base_model_prefix or None, parameters
        )
        if pattern is None:
            if renamed in parameters:
                found[name] = Place(renamed)
        else:
            number = next(index for index, one in enumerate(converters) if pattern in one.source_patterns)
            groups[renamed, number][pattern].append(name)
    for (parameter, number), sources in groups.items():
        found |= _of_group(parameter, converters[number], sources, stored, parameters)
    return found


def _of_group(
    parameter: str, converter: Any, sources: Mapping[str, Sequence[str]], stored: Mapping[str, Shape], parameters: Any
) -> dict[str, Place]:
    """The places of the tensors that one converter turns into one parameter."""
    names = [type(one).__name__ for one in converter.operations]
    listed = [(pattern, sources[pattern]) for pattern in converter.source_patterns if pattern in sources]
    if parameter not in parameters or len(converter.target_patterns) != 1:
        return _unknown(parameter, converter, sources)
    if names == ["MergeModulelist"] and converter.operations[0].dim == 0 and len(listed) == 1:
        return {name: Place(parameter, matrix) for matrix, name in enumerate(listed[0][1])}
    dims = [getattr(one, "dim", None) for one in converter.operations]
    if names == ["MergeModulelist", "Concatenate"] and dims == [0, 1]:
        found: dict[str, Place] = {}
        first = 0
        for _, tensors in listed:
            found |= {name: Place(parameter, matrix, first) for matrix, name in enumerate(tensors)}
            first += stored[tensors[0]][0]
        return found
    if names == ["Transpose"] and len(listed) == 1 and len(listed[0][1]) == 1:
        (name,) = listed[0][1]
        same = tuple(parameters[parameter].shape) == tuple(stored[name])
        if same and getattr(converter.operations[0], "check_dims", False):
            return {name: Place(parameter)}
        return {name: Place(parameter, turned=True)}
    if names == ["Concatenate"] and dims == [0] and len(parameters[parameter].shape) == 2:
        found, first = {}, 0
        for _, tensors in listed:
            for name in tensors:
                found[name] = Place(parameter, first_row=first)
                first += stored[name][0]
        return found
    return _unknown(parameter, converter, sources)


def _unknown(parameter: str, converter: Any, sources: Mapping[str, Sequence[str]]) -> dict[str, Place]:
    steps = ", ".join(type(one).__name__ for one in converter.operations)
    place = Place(parameter, obstacle=f"its files are turned into it by {steps}")
    return {name: place for names in sources.values() for name in names}


def refuse_obstacles(found: Mapping[str, Place], edited: Sequence[str]) -> None:
    """Every edited parameter must have its places.

    Raises:
        ModelError: one has none, or none that can be told.
    """
    there = {place.parameter: place.obstacle for place in found.values()}
    for parameter in edited:
        if parameter not in there:
            raise ModelError(f"{parameter}: the adapter changes it, but the base's files do not hold it")
        if obstacle := there[parameter]:
            raise ModelError(f"{parameter}: cannot be merged in its files ({obstacle})")
