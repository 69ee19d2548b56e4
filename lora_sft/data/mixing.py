"""Several sources, each with its share → the order in which their rows are trained."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lora_sft.errors import DataError


@dataclass(frozen=True)
class Share:
    """What one source gives to the mix.

    Attributes:
        name: what the user calls it.
        rows: how many rows it has.
        weight: its part of the mix, in proportion to the other weights; all sources have one, or none has.
        count: so many of its rows; more than it has repeats them as evenly as can be.
        fraction: such a part of its rows; above 1 repeats them. Not together with count.
    """

    name: str
    rows: int
    weight: float | None = None
    count: int | None = None
    fraction: float | None = None


def mix(
    shares: Sequence[Share], seed: int, replacement: bool = False, size: int | None = None
) -> list[tuple[int, int]]:
    """(index of the source, index of the row) in the order of training.

    Without weights the sources follow each other and each keeps the order of its rows. With weights they are shuffled
    into each other, so that every stretch of the mix has about the right shares. Which rows of a source are drawn
    depends on the seed, its name and its own numbers, not on the other sources; a larger draw contains a smaller one.

    Args:
        shares: the sources.
        seed: decides which rows are drawn, and how a weighted mix is shuffled.
        replacement: a weighted mix may repeat the rows of a source that runs out, all of them equally often.
        size: rows in a weighted mix; None is as many as there can be before a source runs out, or with replacement as
            many as all sources have together.

    Raises:
        DataError: shares that contradict themselves or each other (all of them), or a size that a source is too small
            for.
    """
    problems = [problem for share in shares for problem in _problems(share)]
    problems += _problems_together(shares, replacement, size)
    if problems:
        raise DataError.of(problems)
    limits = [_limit(share) for share in shares]
    if all(share.weight is None for share in shares):
        parts = [_in_order(share, limit, _dice(shares, index, seed)) for index, (share, limit) in _both(shares, limits)]
        return [(index, row) for index, rows in enumerate(parts) for row in rows]
    taken = _rows_by_weight(shares, limits, replacement, size)
    placed: list[tuple[float, int, int]] = []
    for index, (share, limit) in _both(shares, limits):
        dice = _dice(shares, index, seed)
        rows = _shuffled(share, limit, taken[index], dice)
        # One row in each of equally long stretches, somewhere in it: evenly spread and yet shuffled.
        placed += [((place + dice.random()) / len(rows), index, row) for place, row in enumerate(rows)]
    return [(index, row) for _, index, row in sorted(placed)]


def describe(shares: Sequence[Share], order: Sequence[tuple[int, int]]) -> list[tuple[str, int, int, float]]:
    """(name, rows it has, rows taken with repetitions, share of the whole between 0 and 1), a line a source."""
    taken = [0] * len(shares)
    for index, _ in order:
        taken[index] += 1
    whole = max(len(order), 1)
    return [(share.name, share.rows, count, count / whole) for share, count in zip(shares, taken, strict=True)]


def apportion(total: int, weights: Sequence[Fraction]) -> list[int]:
    """`total` in whole numbers in proportion to the weights; what is left over goes to the largest remainders."""
    quotas = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda index: counts[index] - quotas[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _rows_by_weight(shares: Sequence[Share], limits: list[int], replacement: bool, size: int | None) -> list[int]:
    """How many rows each source gives to a weighted mix."""
    # By way of the decimal text: 0.1 is meant as a tenth, not as the nearest binary fraction.
    weights = [Fraction(str(share.weight)) for share in shares]
    if replacement:
        return apportion(sum(limits) if size is None else size, weights)
    largest = min(math.floor(limit * sum(weights) / weight) for limit, weight in zip(limits, weights, strict=True))
    if size is None or size <= largest:
        return apportion(largest if size is None else size, weights)
    needs = [math.ceil(size * weight / sum(weights)) for weight in weights]
    short = [
        f"{share.name} (has {limit} rows, needs {need})"
        for share, limit, need in zip(shares, limits, needs, strict=True)
        if need > limit
    ]
    raise DataError(
        f"a mix of {size} rows with these weights runs out of {', '.join(short)}; the largest mix without repeats is "
        f"{largest}: lower the size, change the weights, or draw with replacement"
    )


def _limit(share: Share) -> int:
    """How many rows a source may give before weights: its count, its fraction, or all."""
    if share.count is not None:
        return share.count
    if share.fraction is not None:
        return max(1, round(Fraction(str(share.fraction)) * share.rows))
    return share.rows


def _in_order(share: Share, limit: int, dice: random.Random) -> list[int]:
    """`limit` rows in the order of the source: whole repetitions, then a sample."""
    whole, rest = divmod(limit, share.rows) if share.rows else (0, 0)
    sample = sorted(dice.sample(range(share.rows), share.rows)[:rest]) if rest else []
    return list(range(share.rows)) * whole + sample


def _shuffled(share: Share, limit: int, count: int, dice: random.Random) -> list[int]:
    """`count` rows of the first `limit` in a shuffled source: whole repetitions, each in its own order, then a rest."""
    order = dice.sample(range(share.rows), share.rows)[:limit]
    whole, rest = divmod(count, len(order))
    repetitions = [row for _ in range(whole) for row in dice.sample(order, len(order))]
    return repetitions + order[:rest]


def _dice(shares: Sequence[Share], index: int, seed: int) -> random.Random:
    """Randomness of one source: from the seed, its name, and how many of the same name stand before it."""
    name = shares[index].name
    before = sum(share.name == name for share in shares[:index])
    return random.Random(f"{seed} {before} {name}")


def _both(shares: Sequence[Share], limits: list[int]) -> list[tuple[int, tuple[Share, int]]]:
    return list(enumerate(zip(shares, limits, strict=True)))


def _problems(share: Share) -> list[str]:
    """What is wrong with one share by itself."""
    problems = []
    for key in ("weight", "fraction"):
        value = getattr(share, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            problems.append(f"{share.name}: {key} is {value}; use a number above 0, or leave the source out")
    if share.count is not None and not (share.count == int(share.count) and share.count > 0):
        problems.append(f"{share.name}: count is {share.count}; use a whole number above 0, or leave the source out")
    if share.count is not None and share.fraction is not None:
        problems.append(f"{share.name}: has count {share.count} and fraction {share.fraction}; give one of the two")
    if not share.rows and not (share.weight is None and share.count is None and share.fraction is None):
        problems.append(f"{share.name}: has no rows to take a share of; leave the source out")
    return problems


def _problems_together(shares: Sequence[Share], replacement: bool, size: int | None) -> list[str]:
    """What is wrong between the shares, and with the size."""
    problems = []
    bare = [share.name for share in shares if share.weight is None]
    if 0 < len(bare) < len(shares):
        problems.append(f"{', '.join(bare)}: no weight, but other sources have one; give one to all or to none")
    if len(bare) == len(shares) and (size is not None or replacement):
        wish = f"size {size}" if size is not None else "replacement"
        problems.append(f"{wish} is for a mix by weight; give every source a weight, or use count or fraction instead")
    if size is not None and size < 1:
        problems.append(f"the size of the mix is {size}; use a whole number above 0")
    return problems
