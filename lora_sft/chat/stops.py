"""Tokenizer, generation config, template → the tokens that end a reply."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
