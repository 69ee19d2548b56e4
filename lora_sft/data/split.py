"""Conversations → a part to train on and a part to evaluate on."""

import random
from collections.abc import Sequence

from lora_sft.data.conversation import Conversation
from lora_sft.errors import DataError


def split_off(
    conversations: Sequence[Conversation], size: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(to train on, to evaluate on), both in the order of the file.

    Args:
        size: a share below 1, or a number of conversations; 0 keeps everything for training.
        seed: decides which conversations are kept out.

    Raises:
        DataError: nothing would be left to train on.
    """
    count = round(size * len(conversations)) if size < 1 else int(size)
    if size > 0:
        count = max(count, 1)
    if count >= len(conversations):
        raise DataError(
            f"eval_size {size:g} keeps {count} of {len(conversations)} conversations for evaluation; nothing is left "
            "to train on"
        )
    kept_out = set(random.Random(seed).sample(range(len(conversations)), count))
    return (
        [conversation for index, conversation in enumerate(conversations) if index not in kept_out],
        [conversation for index, conversation in enumerate(conversations) if index in kept_out],
    )
