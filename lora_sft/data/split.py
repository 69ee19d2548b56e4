"""Conversations → a part to train on and a part to evaluate on, with near-duplicates on the same side."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lora_sft.data.conversation import Conversation
from lora_sft.data.duplicates import clusters
from lora_sft.errors import DataError

# So many near-duplicates are kept together whatever the sizes; see `clusters` for what becomes of more.
KEPT_TOGETHER = 10


@dataclass(frozen=True)
class Split:
    """Two parts, and how near-duplicates steered the line between them.

    Attributes:
        train: to train on, in the order of the file.
        held_out: to evaluate on, in the order of the file.
        asked: how many conversations were to be held out.
        alike: conversations that have an exact or near-duplicate.
        clusters: groups that these stand in; each is on one side.
        largest: conversations in the largest group.
    """

    train: list[Conversation]
    held_out: list[Conversation]
    asked: int
    alike: int
    clusters: int
    largest: int

    def describe(self) -> str:
        """One line for people."""
        words = f"{len(self.held_out)} of {len(self.train) + len(self.held_out)} conversations held out"
        if len(self.held_out) != self.asked:
            words += f" ({self.asked} asked for)"
        if self.alike:
            groups = f"{self.clusters} groups of up to" if self.clusters > 1 else "a group of"
            words += f"; {self.alike} have near-duplicates, in {groups} {self.largest}: each group stays on one side"
        return words


def split_off(
    conversations: Sequence[Conversation], size: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(to train on, to evaluate on), both in the order of the file; near-duplicates are on the same side.

    A group that is larger than the side to evaluate on (and than KEPT_TOGETHER) would never be evaluated. It is taken
    for one form filled in many times, and parted by what was filled in; exact copies always stay together.

    Args:
        conversations: all of them.
        size: a share below 1, or a number of conversations, met as nearly as near-duplicates allow; 0 keeps everything
            for training.
        seed: decides which conversations are kept out.

    Raises:
        DataError: nothing would be left to train on, or all conversations are near-duplicates of each other.
    """
    found = split(conversations, size, seed)
    return found.train, found.held_out


def split(conversations: Sequence[Conversation], size: float, seed: int) -> Split:
    """As `split_off`, with what there is to tell about it."""
    count = round(size * len(conversations)) if size < 1 else int(size)
    if size > 0:
        count = max(count, 1)
    if not count:
        return Split(list(conversations), [], 0, 0, 0, 0)
    if count >= len(conversations):
        raise DataError(
            f"eval_size {size:g} keeps {count} of {len(conversations)} conversations for evaluation; nothing is left "
            "to train on"
        )
    texts = [text_to_compare(conversation) for conversation in conversations]
    cluster_of = clusters(texts, largest=max(count, KEPT_TOGETHER))
    sizes = Counter(cluster_of)
    if len(sizes) == 1:
        raise DataError(
            f"eval_size {size:g}: all {len(conversations)} conversations are near-duplicates of each other, and an "
            "evaluation on what was trained says nothing; give other conversations as eval_dataset, or eval_size 0"
        )
    chosen = _choose(sizes, count, seed)
    groups = [size for size in sizes.values() if size > 1]
    return Split(
        train=[one for one, cluster in zip(conversations, cluster_of, strict=True) if cluster not in chosen],
        held_out=[one for one, cluster in zip(conversations, cluster_of, strict=True) if cluster in chosen],
        asked=count,
        alike=sum(groups),
        clusters=len(groups),
        largest=max(groups, default=0),
    )


def text_to_compare(conversation: Conversation) -> str:
    """What is said and called in a conversation, as one text; of a row of tokens, their numbers as words.

    System messages and tools are left out: all conversations of a dataset may share them, and the longer they are the
    more alike they would make everything.
    """
    if conversation.input_ids is not None:
        return " ".join(map(str, conversation.input_ids))
    parts = [conversation.text or ""]
    for message in conversation.messages:
        if message.get("role") not in ("system", "developer"):
            said = [message.get(key) for key in ("reasoning_content", "content", "tool_calls")]
            parts += [part if isinstance(part, str) else json.dumps(part, default=str) for part in said if part]
    return "\n".join(parts)


def _choose(sizes: Counter[int], count: int, seed: int) -> set[int]:
    """Clusters with `count` conversations together, or as nearly as adding, dropping or swapping one more gets there.

    At least one cluster is chosen, and at least one is not.
    """
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    missing = count
    for cluster in order:
        if sizes[cluster] <= missing:
            chosen.add(cluster)
            missing -= sizes[cluster]
    while missing:
        given, taken = _best_swap(order, sizes, chosen, missing)
        gain = (sizes[taken] if taken is not None else 0) - (sizes[given] if given is not None else 0)
        if chosen and abs(missing - gain) >= abs(missing):
            break
        chosen = (chosen - {given}) | ({taken} if taken is not None else set())
        missing -= gain
    return chosen


def _best_swap(order: list[int], sizes: Counter[int], chosen: set[int], missing: int) -> tuple[int | None, int | None]:
    """(cluster to give back or None, cluster to take or None): what brings the missing conversations nearest to 0."""
    inside: dict[int, int | None] = {0: None}
    outside: dict[int, int | None] = {0: None}
    spare: dict[bool, int] = defaultdict(int)
    for cluster in order:
        spare[cluster in chosen] += 1
        (inside if cluster in chosen else outside).setdefault(sizes[cluster], cluster)
    swaps = [
        (abs(missing - (taken - given)), given, taken)
        for given in inside
        for taken in outside
        if (given or taken) and (taken or spare[True] > 1) and (given or spare[False] > 1)
    ]
    _, given, taken = min(swaps)
    return inside[given], outside[taken]
