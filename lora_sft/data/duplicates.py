"""Texts → which of them are the same, or nearly.

Two texts are the same when their words are: case, white space and punctuation do not count. They are near-duplicates
when they share most of their shingles (runs of five words): a Jaccard index of 0.8 or more. Clusters chain: if a is
near b and b near c, all three are one.

The pairs are found by prefix filtering, which misses none, as hashed signatures (MinHash) would: sort the shingles of
every text from rare to common, and two texts that share four fifths of them must meet among the first few. Source: Xiao
et al., "Efficient Similarity Joins for Near Duplicate Detection" (2008), whose prefix lengths are used below.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Shingles = NDArray[np.uint64]
"""The shingles of one text as 64-bit hashes, ascending, each once."""

SHINGLE_WORDS = 5

# A form that was filled in thousands of times makes every pair a candidate. So many comparisons that fail, and so many
# texts kept for a shingle, bound the time there; only in such data may a pair be missed.
MOST_CANDIDATES = 64

# A word in scripts without spaces is one sign; elsewhere it is letters, digits and marks, or one symbol that carries
# meaning (mathematics, currencies, emoji). What is left over is punctuation.
_SIGN = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_MARK = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0900-\u0dff"
_SYMBOL = "+<=>$£¥\u20a0-\u20bf\u2190-\u2bff\U0001f000-\U0001faff"
_WORD = re.compile(f"[{_SIGN}{_SYMBOL}]|(?:[^\\W_{_SIGN}]|[{_MARK}])+")


def exact_duplicates(texts: Sequence[str]) -> list[list[int]]:
    """Groups of two and more texts with the same words, as positions in `texts`; texts without words are not alike."""
    return [group for group in _different(texts)[0] if len(group) > 1]


def clusters(texts: Sequence[str], largest: int | None = None) -> list[int]:
    """A cluster's number for every text: exact and near-duplicates have the same; numbered as they appear.

    Args:
        texts: texts of fewer than five words are only compared as a whole, texts without words not at all.
        largest: a cluster of more different texts than this is taken for one form that was filled in many times: its
            texts are compared again without the shingles that most of them share. Texts that fill in no more than a
            word stay together. None: no cluster is too large.
    """
    groups, shingles = _different(texts)
    found = _near(shingles)
    if largest is not None:
        found = [part for cluster in found for part in _without_form(cluster, shingles, largest)]
    numbers = [0] * len(texts)
    firsts = sorted((min(groups[member][0] for member in cluster), cluster) for cluster in found)
    for number, (_, cluster) in enumerate(firsts):
        for member in cluster:
            for text in groups[member]:
                numbers[text] = number
    return numbers


def _different(texts: Sequence[str]) -> tuple[list[list[int]], list[Shingles]]:
    """All texts in groups of the same words, in the order of their first; and the shingles of each group."""
    groups: dict[bytes | int, list[int]] = {}
    shingles = []
    for index, text in enumerate(texts):
        words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
        # A digest, not the words: a copy of every text would fill the memory.
        key = hashlib.blake2b(hashes.tobytes(), digest_size=16).digest() if words else index
        if key not in groups:
            groups[key] = []
            shingles.append(_shingles(hashes))
        groups[key].append(index)
    return list(groups.values()), shingles


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    # Not hash(): it differs from process to process.
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _shingles(hashes: NDArray[np.uint64]) -> Shingles:
    """Hashes of the words of a text, in order → its shingles."""
    count = max(len(hashes) - SHINGLE_WORDS + 1, 0)
    mixed = np.zeros(count, np.uint64)
    for place in range(SHINGLE_WORDS if count else 0):
        mixed = (mixed ^ hashes[place : place + count]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)  # otherwise the low bits would never learn of the high ones
    return np.unique(mixed)


def _near(shingles: Sequence[Shingles]) -> list[list[int]]:
    """Positions in clusters of near-duplicates."""
    parent = list(range(len(shingles)))
    texts_with: dict[int, list[int]] = defaultdict(list)
    frequency = _Frequency(shingles)
    # From short to long: a text is then only looked up by longer ones, and a shorter prefix is enough to be found.
    for text in sorted(range(len(shingles)), key=lambda index: len(shingles[index])):
        own = shingles[text]
        looked_up = frequency.rarest(own, len(own) - -(-4 * len(own) // 5) + 1)
        kept = len(own) - -(-8 * len(own) // 9) + 1
        candidates = dict.fromkeys(other for shingle, _ in looked_up for other in texts_with.get(shingle, ()))
        left = MOST_CANDIDATES
        for other in candidates:
            if _root(parent, other) == _root(parent, text) or 5 * len(shingles[other]) < 4 * len(own):
                continue
            if _alike(own, shingles[other]):
                parent[_root(parent, text)] = _root(parent, other)
            elif not (left := left - 1):
                break
        for shingle, place in looked_up:
            if place < kept and len(texts_with[shingle]) < MOST_CANDIDATES:
                texts_with[shingle].append(text)
    found: dict[int, list[int]] = defaultdict(list)
    for text in range(len(shingles)):
        found[_root(parent, text)].append(text)
    return list(found.values())


class _Frequency:
    """In how many texts a shingle stands, counted in a table of fixed size.

    Shingles that share a cell are counted together. That costs time, never a pair: any order of the shingles will do,
    if it is the same for all texts.
    """

    def __init__(self, shingles: Iterable[Shingles]):
        self.cells = np.zeros(1 << 22, np.uint32)
        for own in shingles:
            self.cells[self._cell(own)] += np.uint32(1)

    def _cell(self, own: Shingles) -> Shingles:
        cell: NDArray[np.uint64] = own & np.uint64(len(self.cells) - 1)
        return cell

    def rarest(self, own: Shingles, count: int) -> list[tuple[int, int]]:
        """(shingle, its place from rare to common) of the `count` rarest, without those that no other text has."""
        counted = self.cells[self._cell(own)]
        order = np.argsort(counted, kind="stable")[: min(count, len(own))]
        return [(int(own[index]), place) for place, index in enumerate(order) if counted[index] > 1]


def _root(parent: list[int], text: int) -> int:
    while parent[text] != text:
        parent[text] = parent[parent[text]]
        text = parent[text]
    return text


def _alike(one: Shingles, other: Shingles) -> bool:
    """Whether the Jaccard index is 0.8 or more, in whole numbers: common / (one + other - common) >= 4 / 5."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return 9 * common >= 4 * (len(one) + len(other))


def _without_form(cluster: list[int], shingles: Sequence[Shingles], largest: int) -> list[list[int]]:
    """A cluster that is too large, parted by what its texts do not share."""
    if len(cluster) <= largest:
        return [cluster]
    seen, counts = np.unique(np.concatenate([shingles[text] for text in cluster]), return_counts=True)
    form = seen[2 * counts > len(cluster)]
    own = {text: np.setdiff1d(shingles[text], form, assume_unique=True) for text in cluster}
    bare = [text for text in cluster if len(own[text]) <= SHINGLE_WORDS]  # one other word changes five shingles
    filled = [text for text in cluster if len(own[text]) > SHINGLE_WORDS]
    parts = [[filled[place] for place in part] for part in _near([own[text] for text in filled])]
    if bare:
        parts.append(bare)
    return parts
