"""A model → whether examples that are packed into one row really stay apart in it, proven on the model itself.

Attention does, where transformers builds its mask from `position_ids`; a recurrence or a convolution runs on over the
border unless the model's code stops it, and says nothing. So it is tried: when one example is changed, the logits of
the others must stay as they are, and each must have the logits that it has alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_sft.chat.labels import Example
from lora_sft.console import warn
from lora_sft.kernels.attention import documents, takes_documents
from lora_sft.kernels.swap import left_as_it_was
from lora_sft.training.batching import Batching, lay_end_to_end, lay_in_rows
from lora_sft.training.difference import Difference
from lora_sft.training.evaluation import pad
from lora_sft.training.loss import inputs_of

SIZES = (7, 12, 9)
"""Tokens of the three documents. Short ones leak as well as long ones: what runs over a border fades with distance."""

NOISE_FACTOR = 4.0
"""How much more than the rounding that was measured is still taken for rounding."""

SAME_SHAPE, OTHER_SHAPE = 2.0, 8.0
"""Rounding that is always allowed, in units of the last place of the largest logit: between two computations of one
shape, which mostly agree to the bit, and between two of different shapes."""


class RefusedError(Exception):
    """The model's code raised something at a packed row."""


class Probe(NamedTuple):
    """What was measured.

    Attributes:
        influence: of one document's tokens on the logits of the others, in eval and in training mode.
        company: of the other documents being there at all, in eval mode: a document packed against the same alone.
    """

    influence: list[Difference]
    company: Difference

    @property
    def worst(self) -> Difference:
        """The largest of all, measured by what of it can be rounding."""
        return max([*self.influence, self.company], key=lambda difference: difference.found - difference.allowed)


class Finding(NamedTuple):
    """What becomes of examples in one row.

    Attributes:
        leak: why they must not share one; None if they stay apart.
        apart: the largest difference that was measured; None if the model does not take such a row.
    """

    leak: str | None
    apart: Difference | None


def settle(batching: Batching, model: Any, vocabulary_size: int | None = None) -> Batching:
    """Examples end to end in one row only where that is proven to keep them apart; otherwise padded, and it is said.

    Where the attention knows the borders, it is done without packing too: the examples of a micro-batch are the same,
    and no padding is computed.
    """
    if not batching.packing:
        found = examine(model, vocabulary_size) if _takes_borders(model) else None
        flat = found is not None and found.leak is None
        return replace(batching, one_row=flat, apart=found.apart if found and flat else None)
    found = None
    # Kernels that know the borders take one row. So do recurrent layers, where they keep examples apart at all.
    for one_row in (True,) if batching.micro_batch == 1 or _takes_borders(model) else (False, True):
        found = examine(model, vocabulary_size, one_row)
        if found.leak is None:
            return replace(batching, one_row=one_row, apart=found.apart)
    warn(f"packing is off: {found and found.leak}. Examples of similar length are batched instead")
    return replace(batching, packing=False, order="group_by_length", apart=None)


def leaks(model: Any, vocabulary_size: int | None = None, one_row: bool = True) -> str | None:
    """Why examples must not be packed for this model; None if they stay apart. Arguments as of `examine`."""
    return examine(model, vocabulary_size, one_row).leak


def examine(model: Any, vocabulary_size: int | None = None, one_row: bool = True) -> Finding:
    """Whether examples may be packed for this model.

    Args:
        model: a causal language model of transformers, with or without adapter, quantized or not. Its modes and the
            state of the random generators are left as they were.
        vocabulary_size: token ids from 1 to below this are tried; None takes that of the model's configuration.
        one_row: whether a micro-batch is one row, or several.
    """
    try:
        measured = probe(model, vocabulary_size, one_row)
    except RefusedError as refused:
        return Finding(str(refused), None)
    kind = _kind(model)
    influence = max(measured.influence, key=lambda difference: difference.found - difference.allowed)
    if influence.is_real:
        words = f"{kind} lets one packed example see another: its words move the other's logits by {influence}"
        return Finding(words, influence)
    if measured.company.is_real:
        words = f"{kind} gives an example other logits in a packed row than alone, by {measured.company}"
        return Finding(words, measured.company)
    return Finding(None, measured.worst)


def probe(model: Any, vocabulary_size: int | None = None, one_row: bool = True) -> Probe:
    """Three short random documents in one row, one of them changed, and each alone → the differences.

    Without `one_row`, a second, shorter row stands below.

    Raises:
        RefusedError: the model does not take a packed row.
    """
    documents = _documents(model, vocabulary_size)
    first, middle, last = documents
    changed = [first, _other(middle, documents), last]
    with left_as_it_was(model):
        model.train(False)
        alone = [_padded_logits(model, [document])[0] for document in documents]
        in_rows = _padded_logits(model, documents)
        in_other_rows = _padded_logits(model, changed)
        packed = _packed_logits(model, documents, one_row)
        again = _packed_logits(model, documents, one_row)
        unit = _epsilon(model, packed[0]) * max(float(logits.abs().max()) for logits in packed)
        # What rows of an ordinary batch do to each other is rounding (experts and int8 look at all tokens together).
        noise = max(_distance(packed, again), _distance(in_rows[::2], in_other_rows[::2]))
        moved = _distance(packed[::2], _packed_logits(model, changed, one_row)[::2])
        influence = [Difference(moved, NOISE_FACTOR * noise + SAME_SHAPE * unit)]
        shape = max(noise, _distance(alone, in_rows))
        company = Difference(_distance(packed, alone), NOISE_FACTOR * shape + OTHER_SHAPE * unit)
        model.train(True)
        packed = _packed_logits(model, documents, one_row)
        noise = max(noise, _distance(packed, _packed_logits(model, documents, one_row)))
        moved = _distance(packed[::2], _packed_logits(model, changed, one_row)[::2])
        influence.append(Difference(moved, NOISE_FACTOR * noise + SAME_SHAPE * unit))
    return Probe(influence, company)


def _documents(model: Any, vocabulary_size: int | None) -> list[Example]:
    size = vocabulary_size or model.config.get_text_config().vocab_size
    named = [value for name, value in model.config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    ordinary = torch.tensor([token for token in range(1, size) if token not in special] or list(range(size)))
    generator = torch.Generator().manual_seed(0)
    rows = [ordinary[torch.randint(len(ordinary), (length,), generator=generator)].tolist() for length in SIZES]
    return [Example(row, row) for row in rows]


def _other(document: Example, documents: Sequence[Example]) -> Example:
    """A document of the same length with another token at every place."""
    known = sorted({token for each in documents for token in each.input_ids})
    following = dict(zip(known, [*known[1:], known[0]], strict=True))
    ids = [following[token] for token in document.input_ids]
    return Example(ids, ids)


def _packed_logits(model: Any, documents: Sequence[Example], one_row: bool) -> list[Tensor]:
    """The logits of each document in one packed row: (length, vocabulary)."""
    if one_row:
        batch = lay_end_to_end(documents)
    else:
        batch = lay_in_rows([*documents, documents[0]], Batching(2, sum(SIZES), packing=True), pad_token_id=0)
    try:
        return list(torch.split(_logits(model, batch)[0], list(SIZES)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, the run goes on without packing
        first_line = str(error).partition("\n")[0][:200]
        raise RefusedError(f"the model does not take a packed row ({type(error).__name__}: {first_line})") from error


def _padded_logits(model: Any, documents: Sequence[Example]) -> list[Tensor]:
    """The logits of each document in a row of its own: (length, vocabulary)."""
    logits = _logits(model, pad(documents, pad_token_id=0))
    return [row[: len(document.input_ids)] for row, document in zip(logits, documents, strict=True)]


def _logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    torch.manual_seed(0)  # the same dropout every time
    moved = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with documents(batch.get("max_length_q")):
        return model(**inputs_of(model, moved), use_cache=False).logits  # type: ignore[no-any-return]


def _distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return float(torch.stack([(here.float() - there.float()).abs().max() for here, there in pairs]).max())


def _epsilon(model: Any, logits: Tensor) -> float:
    """Of the coarsest number format in the arithmetic."""
    return max(torch.finfo(dtype).eps for dtype in (logits.dtype, model.dtype) if dtype.is_floating_point)


def _takes_borders(model: Any) -> bool:
    return takes_documents(model) or "flash" in str(getattr(model.config, "_attn_implementation", ""))


def _kind(model: Any) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return str(getattr(base.config, "model_type", type(base).__name__))
