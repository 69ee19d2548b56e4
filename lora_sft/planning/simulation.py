"""Code that computes with tensors without storage → every allocation that it would make, and what it would compute.

The step of a training is run by the real classes on the `meta` device: shapes, dtypes and lifetimes are those of the
real tensors, and nothing is computed. What decides by numbers (masks, borders of documents, labels) decides as ever:
integer and boolean tensors carry their values with them on the CPU.
"""

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import bitsandbytes  # noqa: F401 - its operations are looked up below
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_sft.kernels.standing import StandIn
from lora_sft.planning.flops import flops_of
from lora_sft.planning.hidden import hidden_bytes

_aten = torch.ops.aten

READS = frozenset((_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default))
"""Operations that give a number of Python."""

SIZED_BY_VALUES = frozenset(
    (
        *(_aten.nonzero.default, _aten.masked_select.default, _aten._unique2.default, _aten.unique_dim.default),
        *(_aten.unique_consecutive.default, _aten.repeat_interleave.Tensor, _aten.bincount.default),
    )
)
"""Operations whose result is as large as the values say."""

IN_PLACE_BELOW = frozenset(
    (
        *(_aten.add.Tensor, _aten.index_put.default, _aten.scatter_add.default, _aten.index_add.default),
        *(_aten.masked_fill.Scalar, _aten.masked_scatter.default),
    )
)
"""What autograd does in place where nobody looks on, and anew beneath a dispatch mode (`isTensorSubclassLike`)."""


def _rows_in_8_bits(rows: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """bitsandbytes' quantization of activations, as if no column had outliers: how many have is known only then."""
    outliers = rows.new_empty(0, dtype=torch.int64) if threshold else None
    return rows.new_empty(rows.shape, dtype=torch.int8), rows.new_empty(rows.shape[:-1].numel()).float(), outliers


def _product_in_8_bits(
    rows: Tensor, in_8_bits: Tensor, weight: Tensor, *scales: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(*in_8_bits.shape[:-1], len(weight)), rows.new_empty(len(rows), 0)


def _grouped_product(
    rows: Tensor,
    weights: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch's product of each group of rows with a matrix of its own; without storage it takes bfloat16 alone."""
    shape: tuple[int, ...] = (*rows.shape[:-1], weights.shape[-1])
    if rows.dim() == weights.dim() == 2 and offs is not None:
        shape = (len(offs), rows.shape[0], weights.shape[1])
    elif rows.dim() == 3 and weights.dim() == 2:
        shape = (rows.shape[1], weights.shape[1])
    return rows.new_empty(shape, dtype=out_dtype or rows.dtype)


STAND_INS: dict[Any, Callable[..., Any]] = {
    torch.ops.bitsandbytes.int8_vectorwise_quant.default: _rows_in_8_bits,
    torch.ops.bitsandbytes.int8_mixed_scaled_mm.default: _product_in_8_bits,
    _aten._grouped_mm.default: _grouped_product,
}
"""Operations that have no form without storage, and one that has."""

LARGEST_VALUES = 2**26
"""Elements that a tensor may have whose values are kept."""


class Block(NamedTuple):
    """Memory that was asked for.

    Attributes:
        bytes: as asked for; the device's allocator rounds them up.
        phase: what was being done: `forward`, `loss`, `backward`, `optimizer`, …
        operation: that asked for it.
    """

    bytes: int
    phase: str
    operation: str


class Work(NamedTuple):
    """What one operation computes: equal ones are counted.

    Attributes:
        flops: floating-point operations of its matrix products; 0 for what has none.
        bytes: that it reads and writes.
        dtype: in which it computes.
    """

    flops: int
    bytes: int
    dtype: torch.dtype


class Simulation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, tensors on the `meta` device are followed.

    Attributes:
        blocks: all memory that was asked for, in order; its place there is its number.
        events: n when block n is taken, ~n when it is given back.
        work: {phase: how often which work was done}.
        phase: what is being done now; written into each block.
        operations: names of all that were done.
        parts: what blocks turned out to be, where that is not said by their phase: weights, gradients, …
    """

    def __init__(self, device: StandIn) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.blocks: list[Block] = []
        self.events: list[int] = []
        self.work: defaultdict[str, Counter[Work]] = defaultdict(Counter)
        self.phase = "model"
        self.operations: set[str] = set()
        self.parts: dict[int, str] = {}
        self._held: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._users: Counter[int] = Counter()

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of the block in which a tensor lies; None if nobody has seen it."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        return None if held is None else held[1]

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """What tensors are told as; those that nobody has seen were there before, such as weights."""
        for tensor in tensors:
            self.parts[self._see(tensor, part)] = part

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: torch need not wrap each operation to say so."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """An operation below autograd: done without numbers, and written down."""
        kwargs = dict(kwargs or {})
        given = list(_tensors(args, kwargs))
        device = kwargs.get("device")
        to_meta = device is not None and torch.device(device).type == "meta"
        if not to_meta and not any(tensor.is_meta for tensor in given):
            return func(*args, **kwargs)
        if func in READS or (device is not None and not to_meta):
            return func(*_with_values(args), **_with_values(kwargs))
        if func in SIZED_BY_VALUES:
            values = func(*_with_values(args), **_with_values(kwargs))
            found = _without_storage(values)
        elif func in STAND_INS:
            found = STAND_INS[func](*args, **kwargs)
        else:
            if func is _aten.index.Tensor:
                args = (args[0], [_as_places(one) for one in args[1]])
            found = func(*args, **kwargs)
            if all(_has_values(tensor) for tensor in given):
                self._keep_values(func, args, kwargs, found)
        self._write_down(func, args, kwargs, given, found)
        return found

    def _keep_values(self, func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> None:
        results = list(_tensors((found,), {}))
        if not results or any(one.dtype.is_floating_point or one.numel() > LARGEST_VALUES for one in results):
            return
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        values = func(*_with_values(args), **_with_values(kwargs))
        for one, value in zip(results, _tensors((values,), {}), strict=True):
            if one.is_meta:
                one.planned_values = value  # type: ignore[attr-defined]

    def _write_down(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], found: Any) -> None:
        self.operations.add(func._schema.name)
        results = [one for one in _tensors((found,), {}) if one.is_meta]
        known = len(self.blocks)
        for one in results:
            if func in IN_PLACE_BELOW and given[0].shape == one.shape and _is_called_by_autograd():
                self._goes_on(given[0], one)
            else:
                self._see(one, str(func))
        makes_nothing = len(self.blocks) == known and not func._schema.is_mutable
        if makes_nothing:
            return  # a view
        if hidden := hidden_bytes(func, args, self.device):
            self.blocks.append(Block(hidden, "workspace", str(func)))
            self.events += [len(self.blocks) - 1, ~(len(self.blocks) - 1)]
        flops = flops_of(func, args, kwargs, found)
        moved = sum(_bytes_of(one) for one in given) + sum(_bytes_of(one) for one in results)
        dtype = next((one.dtype for one in (*results, *given) if one.dtype.is_floating_point), torch.int64)
        self.work[self.phase][Work(flops, moved, dtype)] += 1

    def _see(self, tensor: Tensor, operation: str) -> int:
        number = self.number_of(tensor)
        if number is None:
            storage, number = tensor.untyped_storage(), len(self.blocks)
            self.blocks.append(Block(storage.nbytes(), self.phase, operation))
            self.events.append(number)
            self._follow(storage, number)
        return number

    def _goes_on(self, before: Tensor, after: Tensor) -> None:
        """A tensor lies where another one did."""
        number = self.number_of(before)
        if number is not None:
            self._follow(after.untyped_storage(), number)

    def _follow(self, storage: Any, number: int) -> None:
        key = storage._cdata

        def let_go(_: Any) -> None:
            del self._held[key]
            self._users[number] -= 1
            if not self._users[number]:
                self.events.append(~number)

        self._users[number] += 1
        self._held[key] = weakref.ref(storage, let_go), number


def _tensors(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """All tensors in the arguments of an operation, also those in lists."""
    for one in (*args, *kwargs.values()):
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from _tensors(one, {})


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta or hasattr(tensor, "planned_values")


def _with_values(given: Any) -> Any:
    """The same with the values of tensors in their places.

    Raises:
        NotImplementedError: a tensor's values are not known.
    """
    if isinstance(given, Tensor):
        if not _has_values(given):
            raise NotImplementedError(
                f"the step reads numbers that only the real weights have ({tuple(given.shape)}, {given.dtype})"
            )
        return given.planned_values if given.is_meta else given  # type: ignore[attr-defined]
    if isinstance(given, dict):
        return {name: _with_values(value) for name, value in given.items()}
    return type(given)(map(_with_values, given)) if isinstance(given, (list, tuple)) else given


def _without_storage(values: Any) -> Any:
    """Tensors on the CPU → on `meta`, with their values."""
    if isinstance(values, Tensor):
        found = torch.empty_like(values, device="meta")
        found.planned_values = values  # type: ignore[attr-defined]
        return found
    return type(values)(map(_without_storage, values)) if isinstance(values, (list, tuple)) else values


def _as_places(index: Tensor | None) -> Tensor | None:
    """A mask of which the values are known, as the places where it is true."""
    if index is None or index.dtype not in (torch.bool, torch.uint8) or not index.is_meta or index.dim() != 1:
        return index
    return _without_storage(_with_values(index).nonzero().flatten())  # type: ignore[no-any-return]


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_called_by_autograd() -> bool:
    """Whether the operation that is looked at comes from autograd itself, not from a function written in Python."""
    frame = sys._getframe(3)
    while frame.f_code.co_name in ("_fn", "inner") and frame.f_back is not None:  # torch's own, around the mode
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"
