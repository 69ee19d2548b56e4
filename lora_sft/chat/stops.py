"""Tokenizer, generation config, template → the tokens that end a reply."""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]


def stop_tokens_of(tokenizer: "PreTrainedTokenizerBase", eos_token_id: int | Sequence[int] | None = None) -> list[str]:
    """The tokens that end a reply: the tokenizer's eos, and those of the model's generation config.

    Args:
        eos_token_id: of the generation config; None reads the one that lies beside the tokenizer, if it was
            loaded from a folder.
    """
    if eos_token_id is None:
        beside = Path(str(tokenizer.name_or_path)) / "generation_config.json"
        if beside.is_file():
            eos_token_id = json.loads(beside.read_text(encoding="utf-8")).get("eos_token_id")
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    known = [tokenizer.convert_ids_to_tokens(token_id) for token_id in ids]
    eos = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    return list(dict.fromkeys([*eos, *(token for token in known if isinstance(token, str))]))


def put_in(stop: str, places: Iterable[int], text: str, supervised: Spans, literal: Spans) -> tuple[str, Spans, Spans]:
    """A stop token put into a text at each of the places, each of them the end of a supervised span.

    Returns:
        The text and both lists of spans in it. The token is supervised, and never part of a literal stretch.
    """
    cuts = sorted(set(places))

    def moved(place: int, behind: bool = False) -> int:
        """Where a place is in the new text: before the token that is put in there, or behind it."""
        before = sum(1 for cut in cuts if cut < place or (behind and cut == place))
        return place + before * len(stop)

    pieces = pairwise([0, *cuts, len(text)])
    return (
        stop.join(text[first:last] for first, last in pieces),
        [(moved(start), moved(end, behind=True)) for start, end in supervised],
        [
            (moved(start, behind=True), moved(end))
            for first, last in literal
            for start, end in pairwise([first, *(cut for cut in cuts if first < cut < last), last])
        ],
    )
