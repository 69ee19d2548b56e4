"""Text → a byte-level tokenizer trained on it, and a random model small enough for a demo or a test."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sft.chat.templates import Template, control_tokens_in, find_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(texts: Iterable[str], vocabulary_size: int = 512) -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer with the chatml template; `<|im_end|>` ends a reply."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=find_template("chatml").text,
        model_max_length=4096,
    )


def tokenizer_for(template: Template) -> "PreTrainedTokenizerBase":
    """A tiny tokenizer that knows the control tokens of a template, to try it without any model."""
    tokens = control_tokens_in(template)
    stop = next((token for token in template.stops if token in tokens), "</s>")
    tokenizer = tiny_tokenizer([template.text])
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "eos_token": stop, "unk_token": "<unk>", "additional_special_tokens": tokens}
    )
    tokenizer.chat_template = template.text
    return tokenizer


def tiny_model(vocabulary_size: int, seed: int = 0, **shape: Any) -> "PreTrainedModel":
    """A Llama-shaped model with random weights in float32; `shape` overrides fields of `LlamaConfig`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    config = LlamaConfig(
        vocab_size=vocabulary_size, bos_token_id=None, eos_token_id=2, pad_token_id=0, **(sizes | shape)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save_tiny(
    folder: str | Path, texts: Iterable[str], vocabulary_size: int = 512, seed: int = 0, **shape: Any
) -> Path:
    """Writes a tiny tokenizer and model to a folder, as `from_pretrained` reads them."""
    tokenizer = tiny_tokenizer(texts, vocabulary_size)
    tiny_model(len(tokenizer), seed, **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
