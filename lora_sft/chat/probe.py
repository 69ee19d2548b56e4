"""A tokenizer with its template → the stop token that it uses without naming it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_sft.chat.control import special_tokens_of
from lora_sft.chat.rendering import render
from lora_sft.chat.turns import STOP_GUESSED
from lora_sft.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TALK = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Good morning."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well."},
]


def guess_stop_token(tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str]) -> str | None:
    """The special token with which the template ends replies, if it ends them with none of `stops`.

    Many base models name `<|endoftext|>` as their eos and bring a template that ends turns with `<|im_end|>`.
    """
    try:
        rendered = render(TALK, tokenizer, stop_tokens=stops)
    except TemplateError:
        return None  # the conversations themselves will tell what is wrong
    if not any(note.status == STOP_GUESSED and note.turn == 1 for note in rendered.notes):
        return None
    start, end = rendered.supervised[-1]  # earlier turns may end otherwise
    learned = rendered.text[start:end]
    return next((token for token in special_tokens_of(tokenizer) if learned.endswith(token)), None)
