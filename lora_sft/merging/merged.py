"""An adapter and its base → the merged model, tensor by tensor and row by row; nothing more is held."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_sft.errors import ModelError
from lora_sft.merging.adapter import WEIGHTS, AdapterEdits, read_edits, skeleton_ties
from lora_sft.merging.base_files import base_folder, copy_small_files, weight_tensors
from lora_sft.merging.base_tensors import BaseTensors
from lora_sft.merging.combine import Blend, check_blend, dense_update
from lora_sft.merging.edits import Edit, LowRank, Matrix, Replacement, Rows, matrix_of
from lora_sft.merging.placement import Place, places, refuse_obstacles
from lora_sft.merging.plain_adapter import plain_edits
from lora_sft.merging.quantized import Quantization
from lora_sft.model.base import BaseSpec, quantized_modules, read_config, skeleton
from lora_sft.model.loading import recorded_quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE = 2**21
"""Numbers that are computed together: 8 MiB in float32."""


def open_merged(
    adapter: Path | Sequence[Path], spec: BaseSpec, onto: str = "trained", blend: Blend | None = None
) -> "MergedModel":
    """The merged model of an adapter, or of several; only headers and settings are read.

    Args:
        spec: how the base was loaded in training.
        onto: `trained`, the base as it was in training; `original`, as it is published.
        blend: how several adapters are added up.

    Raises:
        ModelError: a base or an adapter cannot be had, or cannot be merged; says which tensor and why.
    """
    folders = [adapter] if isinstance(adapter, Path) else list(adapter)
    blend = blend or Blend.even(len(folders))
    how = Quantization.of(spec) if onto == "trained" else None
    base, adapters = _plainly(folders, spec, how) or _with_peft(folders, spec, how)
    check_blend(folders, [one.edits for one in adapters], blend)
    base = replace(base, is_original=onto == "original")
    if not all(one.shares_embeddings for one in adapters) or any(one.ends_edited for one in adapters):
        base = _untie(base, base.skeleton(), adapters)
    merged = MergedModel(spec, onto, folders, base_folder(spec), base, [one.edits for one in adapters], blend)
    refuse_obstacles(base.places, sorted({name for one in adapters for name in one.edits}))
    merged.check_new_rows()
    return merged


def _plainly(
    folders: Sequence[Path], spec: BaseSpec, how: Quantization | None
) -> "tuple[BaseTensors, list[AdapterEdits]] | None":
    """Base and edits as far as their files alone tell; None where PEFT has to be asked."""
    if how is not None or not all((folder / WEIGHTS).is_file() for folder in folders):
        return None
    there = base_folder(spec)
    if not (there / "config.json").is_file() or "quantization_config" in json.loads(
        (there / "config.json").read_text(encoding="utf-8")
    ):
        return None
    stored = weight_tensors(there)
    found = [plain_edits(folder, WEIGHTS, stored) for folder in folders]
    edits = [AdapterEdits(dict(one), shares_embeddings=True) for one in found if one is not None]
    if len(edits) < len(folders):
        return None
    build = lru_cache(1)(lambda: skeleton(read_config(spec), spec))
    return BaseTensors(stored, {name: Place(name) for name in stored}, build, spec, None, set()), edits


def _with_peft(
    folders: Sequence[Path], spec: BaseSpec, how: Quantization | None
) -> "tuple[BaseTensors, list[AdapterEdits]]":
    """Base and edits as transformers and PEFT understand them."""
    config = read_config(spec)
    stored = weight_tensors(base_folder(spec))
    plain = skeleton(config, spec)
    found = places({name: tensor.shape for name, tensor in stored.items()}, plain)
    adapters = [read_edits(folder, skeleton(config, spec)) for folder in folders]
    quantized: set[str] = set()
    if how is not None:
        record = recorded_quantization(folders[0])
        how = replace(how, blocksize=record.get("blocksize") or how.blocksize)
        quantized = quantized_modules(plain, record.get("skipped"))
    return BaseTensors(stored, found, lambda: plain, spec, how, quantized), adapters


def _untie(base: "BaseTensors", plain: "PreTrainedModel", adapters: Sequence[AdapterEdits]) -> "BaseTensors":
    """Where an adapter changes the embeddings or the head alone, they are two matrices from here on."""
    if not skeleton_ties(plain):
        return base
    names = {id(module): f"{name}.weight" for name, module in plain.named_modules()}
    embeddings, head = names[id(plain.get_input_embeddings())], names[id(plain.get_output_embeddings())]
    by_parameter = {place.parameter: name for name, place in base.places.items()}
    stored, found = dict(base.stored), dict(base.places)
    if all(one.shares_embeddings for one in adapters):
        if head in by_parameter and by_parameter[head] != by_parameter.get(embeddings):
            stored.pop(by_parameter[head])  # a second copy, which nobody reads and which would be stale
            found.pop(by_parameter[head])
        return replace(base, stored=stored, places=found)
    source = stored[by_parameter[embeddings] if embeddings in by_parameter else by_parameter[head]]
    for end in (embeddings, head):
        if end not in by_parameter:
            stored[end], found[end] = source, Place(end)
    return replace(base, stored=stored, places=found, untied=True)


@dataclass(frozen=True)
class MergedModel:
    """The merged model, whose tensors are computed when they are asked for.

    Attributes:
        onto: `trained` or `original`.
        adapters: their folders.
        folder: of the base's files.
        edits: of each adapter, {parameter: its edits}.
        blend: how several are added up.
    """

    spec: BaseSpec
    onto: str
    adapters: Sequence[Path]
    folder: Path
    base: BaseTensors
    edits: Sequence[Mapping[str, Sequence[Edit]]]
    blend: Blend

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name in the base's files: shape in the merged model}, in the order of the files."""
        return {name: self._shape(name) for name in self.base.stored}

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.base.stored[name].shape
        for edit in self.edits_of(name):
            if isinstance(edit, Replacement) and self.base.places[name].matrix is None:
                shape = edit.shape
            if isinstance(edit, Rows):
                shape = (max(shape[0], max(edit.indices, default=0) + 1), *shape[1:])
        return shape

    def edits_of(self, name: str) -> list[Edit]:
        """What the adapters do to a tensor, each multiplied with its weight."""
        place = self.base.places.get(name)
        return [
            edit.weighted(weight) if isinstance(edit, LowRank) and weight != 1 else edit
            for one, weight in zip(self.edits, self.blend.weights, strict=True)
            for edit in (one.get(place.parameter, ()) if place else ())
        ]

    def is_edited(self, name: str) -> bool:
        """Whether an adapter changes this tensor."""
        return bool(self.edits_of(name))

    def is_turned_when_quantized(self, name: str) -> bool:
        """Whether training quantized this tensor the other way round, as it does with GPT-2's."""
        return self.base.how is not None and self.base.is_quantized(name) and self.base.is_turned(name)

    def is_as_stored(self, name: str) -> bool:
        """Whether the tensor is just what lies in the base's file."""
        return not self.is_edited(name) and self.base.is_as_stored(name)

    def dtype_of(self, name: str, wanted: torch.dtype) -> torch.dtype:
        """The dtype that a tensor has in a model of dtype `wanted`."""
        stored = self.base.stored[name].dtype
        if not stored.is_floating_point or stored.itemsize == 1 or name not in self.base.places:
            return stored
        if stored == wanted or wanted == torch.float32:
            return wanted
        return torch.float32 if self.base.stays_float32(name) else wanted

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor from its first row to its last, (rows, columns) at a time, in float32."""
        shape, stored = self.shapes[name], self.base.stored[name]
        read = self.base.rows(name)
        step = max(PIECE // stored.columns, 1)
        if not self.is_edited(name):
            for start in range(0, stored.rows, step):
                yield read(start, min(start + step, stored.rows))
            return
        stack, height = _stack(shape), stored.rows // _stack(stored.shape)
        for matrix in range(stack):
            edited = self._matrix(name, matrix)
            new_height = (shape[0] if len(shape) < 3 else shape[1]) if stack == 1 else height
            for start in range(0, new_height, step):
                stop = min(start + step, new_height)
                yield edited(read, matrix * height, start, stop, height)

    def _matrix(self, name: str, matrix: int) -> "Callable[..., Tensor]":
        """How rows of one matrix of a file's tensor come about: (read, its first row, start, stop, rows there)."""
        edits, place = self.edits_of(name), self.base.places[name]
        number = matrix if place.matrix is None else place.matrix
        whole = next((edit for edit in edits if isinstance(edit, Replacement)), None)
        done = self._done(name, place, number, edits)

        def rows(read: Callable[[int, int], Tensor], first: int, start: int, stop: int, height: int) -> Tensor:
            if whole is not None:
                offset = place.first_row + number * (whole.shape[-2] if len(whole.shape) > 2 else 0)
                base = whole.read(offset + start, offset + stop).float()
            elif stop <= height:
                base = read(first + start, first + stop)
            else:  # rows that training added
                base = torch.zeros(stop - start, self.base.stored[name].columns)
                if start < height:
                    base[: height - start] = read(first + start, first + height)
            return done.apply(base, place.first_row + start)

        return rows

    def _done(self, name: str, place: Place, number: int, edits: Sequence[Edit]) -> Matrix:
        if self.blend.is_dense and any(isinstance(edit, LowRank) for edit in edits):
            updates = [
                [edit.of(number) for edit in one.get(place.parameter, ()) if isinstance(edit, LowRank)]
                for one in self.edits
            ]
            rest = [edit for edit in edits if not isinstance(edit, LowRank)]
            plain = replace(matrix_of(rest, number, self._base_pieces(name)), dense=None)
            done = replace(plain, dense=dense_update(updates, self.blend, f"{place.parameter}/{number}"))
        else:
            done = matrix_of(edits, number, self._base_pieces(name))
        return done.transposed if place.turned else done

    def _base_pieces(self, name: str) -> Callable[[], Iterator[tuple[int, Tensor]]]:
        """The base's rows once through, which DoRA needs for the lengths."""
        read, stored = self.base.rows(name), self.base.stored[name]
        whole = next((edit for edit in self.edits_of(name) if isinstance(edit, Replacement)), None)
        rows, step = self.shapes[name][0] if whole else stored.rows, max(PIECE // stored.columns, 1)

        def pieces() -> Iterator[tuple[int, Tensor]]:
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                yield start, whole.read(start, stop).float() if whole else read(start, stop)

        return pieces

    def tensor(self, name: str) -> Tensor:
        """A whole tensor: in float32 where adapter or quantization changes it, else as it is stored."""
        if self.is_as_stored(name):
            return self.base.stored[name].read()
        return torch.cat(list(self.pieces(name))).reshape(self.shapes[name])

    def check_new_rows(self) -> None:
        """Every row that training added must come with the adapter: its start was drawn by lot.

        Raises:
            ModelError: some do not.
        """
        for name, shape in self.shapes.items():
            stored = self.base.stored[name].shape
            if shape == stored or any(isinstance(edit, Replacement) for edit in self.edits_of(name)):
                continue
            held = {row for edit in self.edits_of(name) if isinstance(edit, Rows) for row in edit.indices}
            if lacking := set(range(stored[0], shape[0])) - held:
                raise ModelError(
                    f"{name}: training added rows {stored[0]} to {shape[0] - 1}, but {min(lacking)} is not in the "
                    "adapter; its values cannot be known"
                )

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of the embeddings, if training added some."""
        if all(shape == self.base.stored[name].shape for name, shape in self.shapes.items()):
            return None
        plain = self.base.skeleton()
        end = {id(module): name for name, module in plain.named_modules()}[id(plain.get_input_embeddings())]
        for name, place in self.base.places.items():
            if place.parameter == f"{end}.weight" and self.shapes[name] != self.base.stored[name].shape:
                return self.shapes[name][0]
        return None

    def write_small_files(self, folder: Path, dtype: str) -> None:
        """Settings, tokenizer, chat template and the base's code → `folder`."""
        patch: dict[str, Any] = {"dtype": dtype}
        if self.base.untied:
            patch["tie_word_embeddings"] = False
        if self.vocabulary_size is not None:
            patch["vocab_size"] = self.vocabulary_size
        copy_small_files(self.folder, self.adapters[0], folder, patch, self.vocabulary_size is not None)


def _stack(shape: tuple[int, ...]) -> int:
    """How many matrices a tensor holds."""
    count = 1
    for size in shape[:-2]:
        count *= size
    return count
