"""Rendered text → tokens, and for each the characters that it stands for."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING

from lora_sft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = itemgetter(0), itemgetter(1)


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text.

    Attributes:
        ids: (length).
        offsets: (start, end) in the text of each token's first and behind its last character, (length).
    """

    ids: list[int]
    offsets: list[tuple[int, int]]

    def straddle(self, place: int) -> bool:
        """Whether a token may have characters on both sides of a place."""
        behind = bisect_left(self.offsets, place, key=START)
        before_ends = self.offsets[behind - 1][1] if behind else place
        # Byte-level tokenizers may leave white space out of a token's offsets: a gap counts as straddled.
        closed = before_ends == place or behind == len(self.offsets) or self.offsets[behind][1] == place
        return before_ends > place or not closed

    def inside(self, start: int, end: int) -> tuple[int, int]:
        """(first, behind the last) of the tokens whose characters all lie in [start, end)."""
        first = bisect_left(self.offsets, start, key=START)
        last = bisect_right(self.offsets, end, key=END)
        # Some tokenizers report white space as empty, (end, end); it belongs to where it ends.
        while first < last and self.offsets[first][1] <= start:
            first += 1
        return first, max(first, last)


def tokenize(
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    literal: Sequence[tuple[int, int]] = (),
    splits: Sequence[int] = (),
) -> Tokens:
    """Text → tokens. No special tokens are added.

    Args:
        literal: stretches in which no control token is read, though the text spells some.
        splits: places that no token may straddle.

    Raises:
        ModelError: the tokenizer does not tell which characters a token stands for, or changes a text that is
            read in pieces.
    """
    cuts = {place for stretch in literal for place in stretch} | (set(splits) if tokenizer.is_fast else set())
    borders = sorted({0, len(text), *cuts})
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for begin, end in pairwise(borders):
        is_literal = any(first <= begin and end <= last for first, last in literal)
        if tokenizer.is_fast:
            found, places = _encode(text[begin:end], tokenizer, is_literal, goes_on=begin > 0)
        else:
            inner = [place - begin for place in splits if begin < place < end]
            found, places = _encode_without_offsets(text[begin:end], tokenizer, is_literal, inner)
        ids += found
        offsets += [(begin + first, begin + last) for first, last in places] if begin else places
    if len(borders) > 2 and tokenizer.decode(ids) != tokenizer.decode(_ids(text, tokenizer)):
        raise ModelError(
            f"{'a message spells a control token' if literal else 'a reply begins inside a token'}, and "
            f"{type(tokenizer).__name__} changes a text that is read in pieces, so its labels would not be exact; "
            "take the row out of the data"
        )
    return Tokens(ids, offsets)


def _encode(
    text: str, tokenizer: "PreTrainedTokenizerBase", is_literal: bool, goes_on: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, offsets) of a piece of text; `goes_on` says that it is not the beginning of the whole."""
    backend = tokenizer.backend_tokenizer
    if is_literal or backend.truncation is not None or backend.padding is not None or backend.encode_special_tokens:
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=is_literal
        )
        return encoded["input_ids"], encoded["offset_mapping"]
    # The same as above without its detour, which takes a fifth of the time.
    if not goes_on:
        found = backend.encode(text, add_special_tokens=False)
        return found.ids, found.offsets
    anchor = str(tokenizer.eos_token or "")  # some tokenizers put a space before the very first token
    found = backend.encode(anchor + text, add_special_tokens=False)
    skipped = sum(last <= len(anchor) for _, last in found.offsets) if anchor else 0
    return found.ids[skipped:], [(first - len(anchor), last - len(anchor)) for first, last in found.offsets[skipped:]]


def _encode_without_offsets(
    text: str, tokenizer: "PreTrainedTokenizerBase", is_literal: bool, places: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, offsets as exact as the places): where each place lies is told by the tokens of the text before it.

    Raises:
        ModelError: the tokens before a place are not those with which the whole begins.
    """
    whole = _ids(text, tokenizer, is_literal)
    offsets: list[tuple[int, int]] = []
    for begin, end in pairwise([0, *places, len(text)]):
        before = whole if end == len(text) else _ids(text[:end], tokenizer, is_literal)
        if before != whole[: len(before)] or len(before) < len(offsets):
            raise ModelError(
                f"{type(tokenizer).__name__} does not tell which characters a token stands for (no offsets), and reads "
                "a conversation otherwise when it breaks off at a reply; use the model's fast tokenizer"
            )
        offsets += [(begin, end)] * (len(before) - len(offsets))
    return whole, offsets


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase", is_literal: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=is_literal)["input_ids"])
