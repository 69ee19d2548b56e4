"""Control tokens in rendered text: which of them the template writes, and which a message merely spells.

A message that says `<|im_end|>` must not end a turn. Where one spells a control token, that stretch of text is read
with control tokens switched off.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from re import Pattern, compile, escape
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lora_sft.chat.traced import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ControlTokens:
    """Where special tokens stand in a text, [(start, end)] each.

    Attributes:
        written: by the template; or by a reply that may, as with `<think>`.
        spelled: by messages that must not.
    """

    written: list[tuple[int, int]] = field(default_factory=list)
    spelled: list[tuple[int, int]] = field(default_factory=list)


_patterns: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Pattern[str]]]" = WeakKeyDictionary()


def special_tokens_of(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The tokens that a tokenizer reads as control tokens, the longest first."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    known |= {str(token) for token in tokenizer.all_special_tokens}
    return sorted(known, key=len, reverse=True)


def find_control_tokens(
    text: str, runs: Sequence[Run], tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str], replies: Sequence[int]
) -> ControlTokens:
    """All control tokens in a text that is made of `runs`.

    Those in a reply count as written, for a reply may hold tokens of its own (`<think>`, `<tool_call>`), unless they
    end a turn or are written by the template for somebody else.

    Args:
        replies: which of the messages are replies.
    """
    pattern = _pattern(tokenizer)
    written, in_replies, spelled = [], [], []
    foreign = set(stops)
    own = set(replies)
    at = 0
    for match in pattern.finditer(text) if pattern.pattern else ():
        place = match.span()
        while runs[at].end <= place[0]:
            at += 1
        across = [run for run in runs[at : at + place[1] - place[0]] if run.start < place[1]]
        speakers = {run.message for run in across if run.is_own}
        if not speakers:
            written.append(place)
            if across[0].message not in own:
                foreign.add(match.group())
        elif speakers <= own:
            in_replies.append(place)
        else:
            spelled.append(place)
    for first, last in in_replies:
        (spelled if text[first:last] in foreign else written).append((first, last))
    return ControlTokens(sorted(written), sorted(spelled))


def literal_stretches(text: str, found: ControlTokens, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, int]]:
    """The stretches in which messages spell control tokens, each from one written token to the next."""
    if not found.spelled:
        return []
    known = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    stretches: list[tuple[int, int]] = []
    for place in found.spelled:
        first = max((last for _, last in found.written if last <= place[0]), default=0)
        last = min((first for first, _ in found.written if first >= place[1]), default=len(text))
        before = next((text[slice(*token)] for token in found.written if token[1] == first), "")
        behind = next((text[slice(*token)] for token in found.written if token[0] == last), "")
        # White space that such a token swallows stays with it.
        if before and known[before].rstrip:
            first += len(text[first:last]) - len(text[first:last].lstrip())
        if behind and known[behind].lstrip:
            last -= len(text[first:last]) - len(text[first:last].rstrip())
        if (first, last) not in stretches:
            stretches.append((first, last))
    return stretches


def _pattern(tokenizer: "PreTrainedTokenizerBase") -> Pattern[str]:
    """Matches each special token; compiled again when the vocabulary has grown."""
    size, pattern = _patterns.get(tokenizer, (-1, compile("")))
    if size != len(tokenizer):
        pattern = compile("|".join(map(escape, special_tokens_of(tokenizer))))
        _patterns[tokenizer] = (len(tokenizer), pattern)
    return pattern
