"""The tokenizer that a run trains with: template, stop tokens, padding, new tokens."""

import pytest
from transformers import GenerationConfig

from lora_sft.chat.templates import find_template
from lora_sft.errors import TemplateError
from lora_sft.model.tokenizer import prepare_speech


def test_the_models_own_template_is_kept(tokenizer):
    template = tokenizer.chat_template
    speech = prepare_speech(tokenizer, GenerationConfig(eos_token_id=[0]))
    assert speech.tokenizer.chat_template == template
    assert speech.stop_tokens == ["<|im_end|>", "<|endoftext|>"]


def test_the_token_with_which_a_template_of_ours_ends_a_reply_becomes_eos(tokenizer, capsys):
    tokenizer.eos_token = "<|endoftext|>"
    assert prepare_speech(tokenizer, chat_template="chatml").stop_tokens[0] == "<|im_end|>"
    assert "stop token: <|im_end|>" in capsys.readouterr().err


def test_a_template_whose_stop_token_is_unknown_is_refused_with_what_to_do(tokenizer):
    with pytest.raises(TemplateError, match=r'--new-tokens "<\|begin_of_text\|>,<\|start_header_id\|>'):
        prepare_speech(tokenizer, chat_template="llama3")


def test_new_tokens_make_such_a_template_possible(tokenizer):
    size = len(tokenizer)
    speech = prepare_speech(
        tokenizer, chat_template="llama3", new_tokens=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    )
    assert speech.new_token_ids == [size, size + 1, size + 2]
    assert speech.stop_tokens == ["<|eot_id|>"]
    assert tokenizer.encode("<|eot_id|>") == [size + 2]


def test_padding_is_the_eos_where_there_is_none(tokenizer, capsys):
    tokenizer.pad_token = None
    assert prepare_speech(tokenizer).tokenizer.pad_token == "<|im_end|>"
    assert "padding: <|im_end|>" in capsys.readouterr().err


def test_without_any_stop_token_nothing_could_be_learned(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="could not learn to stop"):
        prepare_speech(tokenizer)


def test_no_template_is_told_with_what_to_do(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="choose one with chat_template"):
        prepare_speech(tokenizer)


def test_a_base_model_whose_eos_is_not_what_the_template_writes_learns_both(tokenizer, capsys):
    """Qwen's base models name <|endoftext|> and end their turns with <|im_end|>."""
    tokenizer.eos_token = "<|endoftext|>"
    assert prepare_speech(tokenizer).stop_tokens == ["<|endoftext|>", "<|im_end|>"]
    assert "<|im_end|> (guessed" in capsys.readouterr().err


def test_a_template_of_the_users_own_folder_is_found_by_name(tokenizer, tmp_path):
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{{ m.role }}={{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant={% endif %}"
    )
    (tmp_path / "chatml.jinja").write_text("mine")
    mine = prepare_speech(tokenizer, chat_template="mine", chat_template_dir=str(tmp_path)).tokenizer
    assert mine.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "user=x<|im_end|>"
    assert find_template("chatml", tmp_path).text == "mine"
    with pytest.raises(TemplateError, match="no such folder"):
        find_template("chatml", tmp_path / "none")
