"""A conversation's text and its tokens → what stands on the page: pieces of text with their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_sft.chat import IGNORED
from lora_sft.chat.tokens import Tokens


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is one token, or that several share, as the bytes of one emoji do.

    Attributes:
        text: what is shown; a conversation is the pieces one after the other.
        ids: of its tokens, none where the tokenizer leaves text out.
        is_learned: whether the model must produce it.
    """

    text: str
    ids: tuple[int, ...]
    is_learned: bool


def pieces_of(text: str, tokens: Tokens, labels: Sequence[int]) -> list[Piece]:
    """The whole text in pieces, in order."""
    found: list[Piece] = []
    ids: list[int] = []
    begin = position = 0
    learned = False

    def close() -> None:
        if ids or position > begin:
            found.append(Piece(text[begin:position], tuple(ids), learned))

    for token, (start, end), label in zip(tokens.ids, tokens.offsets, labels, strict=True):
        shares = ids and (start < position or start == end)
        if not shares:
            close()
            if start > position:
                found.append(Piece(text[position:start], (), False))
            begin, ids, learned = max(start, position), [], label != IGNORED
            position = begin
        ids.append(token)
        position = max(position, end)
    close()
    if position < len(text):
        found.append(Piece(text[position:], (), False))
    return found
