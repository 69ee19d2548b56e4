"""A tokenizer → the name that llama.cpp has for the way it cuts text into words before it merges them.

llama.cpp knows a fixed set of such ways by name, each written in C++. The converter recognises published tokenizers
by a hash over token ids; a tokenizer that was trained or changed is not among them, so its regular expressions are
compared with those of llama.cpp. That the name is right is proven later, by token ids in the runtime.
"""

import ast
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN35 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
# Only those that llama.cpp keeps to the letter: its `gpt-4o` and `tekken` cut at combining marks, where the original
# expressions do not (as in नमस्ते), so that they are taken for published tokenizers alone.
# (regular expressions in turn, whether a word that is a token is taken whole, without merging) → llama.cpp's name
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((LLAMA3,), False): "smaug-bpe",
    ((LLAMA3,), True): "llama-bpe",
}

NORMALIZERS = ("NFC",)
"""What may happen to text before it is cut: llama.cpp leaves it out, which only tells on decomposed letters."""


def is_byte_level(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether it merges bytes, as GPT-2 began it; others (SentencePiece) need no name."""
    described = _described(tokenizer)
    if described is None or described["model"]["type"] != "BPE":
        return False
    return any(step["type"] == "ByteLevel" for step in _steps(described.get("pre_tokenizer"), "pretokenizers"))


def published_pre(tokenizer: "PreTrainedTokenizerBase", converter: Path) -> str | None:
    """llama.cpp's name for a published tokenizer, which the converter's own list knows by a hash over token ids.

    The list is read, not run: it stands in the converter's source as pairs of hash and name.
    """
    source = (converter / "conversion" / "base.py").read_text(encoding="utf-8")
    text = re.search(r"^ *chktxt = (['\"].*['\"])$", source, re.MULTILINE)
    if text is None:
        return None
    ids = tokenizer.encode(ast.literal_eval(text[1]))
    found = hashlib.sha256(str(ids).encode()).hexdigest()
    names: dict[str, str] = dict(re.findall(r'chkhsh == "([0-9a-f]{64})":\s*(?:#.*\s*)?res = "([^"]+)"', source))
    return names.get(found)


def derive_pre(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """llama.cpp's name for a byte-level tokenizer's cutting; None if llama.cpp has none that is equal."""
    described = _described(tokenizer)
    if described is None:
        return None
    if any(step["type"] not in NORMALIZERS for step in _steps(described.get("normalizer"), "normalizers")):
        return None
    expressions = _expressions(_steps(described.get("pre_tokenizer"), "pretokenizers"))
    whole = bool(described["model"].get("ignore_merges"))
    return NAMES.get((tuple(expressions), whole)) if expressions is not None else None


def _expressions(steps: Sequence[dict[str, Any]]) -> list[str] | None:
    """The regular expressions that cut in turn; None if one of the steps does something else."""
    found: list[str] = []
    for step in steps:
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            found += [GPT2] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step.get("individual_digits"):
            found.append(DIGIT)
        elif step["type"] == "Split" and _cuts_out(step):
            found.append(step["pattern"]["Regex"])
        else:
            return None
    return found


def _cuts_out(step: dict[str, Any]) -> bool:
    """Whether each match becomes a word; where the expression matches everything, what is between is nothing."""
    behavior, is_inverted = step.get("behavior"), bool(step.get("invert"))
    return "Regex" in step.get("pattern", {}) and (behavior == "Isolated" or (behavior == "Removed" and is_inverted))


def _steps(given: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The steps in turn, whether they stand alone or in a Sequence."""
    if given is None:
        return []
    if given["type"] != "Sequence":
        return [given]
    return [step for part in given[inside] for step in _steps(part, inside)]


def _described(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any] | None:
    """What `tokenizer.json` says; None for a tokenizer that is written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described: dict[str, Any] | None = json.loads(backend.to_str()) if backend is not None else None
    return described
