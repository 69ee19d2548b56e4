"""What Ollama is given writes what was trained: the Modelfile, its template, its stop tokens, the bos token."""

import json
import re
from dataclasses import replace

import pytest
from transformers import AutoTokenizer, GenerationConfig

from lora_sft import finetune
from lora_sft.chat.templates import find_template
from lora_sft.errors import ModelError, TemplateError, VerificationError
from lora_sft.exporting import ollama
from lora_sft.exporting.gguf import GGUF
from lora_sft.exporting.go.language import execute
from lora_sft.exporting.go.proof import ollama_values
from lora_sft.exporting.llama_cpp import converter as llama_cpp
from lora_sft.exporting.ollama import OLLAMA, adds_bos, modelfile
from lora_sft.exporting.target import Facts, Order
from lora_sft.model.base import BaseSpec
from lora_sft.model.loading import trained_base
from lora_sft.model.tiny import save_tiny, tiny_model, tiny_tokenizer, tokenizer_for
from tests.conftest import FEW, HARBOUR, conversation

TALK = conversation("hi", "  yo\n", "and {{ you }}?")


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Instructions as Ollama reads them: a value ends with its line, or with its quotes where it begins with some."""
    found, rest = [], text
    while rest.strip():
        name, rest = re.match(r"\s*(FROM|TEMPLATE|PARAMETER \w+) (?s:(.*))", rest).groups()
        quotes = next((quotes for quotes in ('"""', '"') if rest.startswith(quotes)), "")
        end = rest.index(quotes + "\n", len(quotes))
        found.append((name, rest[len(quotes) : end]))
        rest = rest[end + len(quotes) :]
    return found


def saved_adapter(folder, template: str, **manifest):
    """What an export reads of an adapter folder, without its weights."""
    tokenizer = tokenizer_for(find_template(template))
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "<|endoftext|>"])
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return tokenizer


def write_gguf(path, **flags):
    gguf = pytest.importorskip("gguf", reason="the package that reads and writes GGUF is not installed")
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_gguf(monkeypatch, **flags):
    """The GGUF target plays no part here: what it writes is the one flag that decides about the bos token."""

    def write(order):
        write_gguf(order.folder / "model-F16.gguf", **flags)
        return {"file": "model-F16.gguf", "verified": {"mean_kl": 0.0}, "serve": "llama-server", "asked": order.options}

    monkeypatch.setattr(ollama, "GGUF", replace(GGUF, write=write, refusals=lambda facts, options: []))


def export(tmp_path, **options):
    (tmp_path / "out").mkdir()
    order = Order(tmp_path, BaseSpec("unused"), tmp_path / "out", tmp_path / "My Model!", options=options)
    return OLLAMA.write(order), read_modelfile((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8"))


def test_the_modelfile_holds_the_file_the_template_and_all_stop_tokens(tmp_path, monkeypatch):
    with_gguf(monkeypatch, add_bos_token=False)
    tokenizer = saved_adapter(tmp_path, "chatml")
    result, instructions = export(tmp_path, num_ctx="8192", quantization="q8_0")
    assert [(name, value) for name, value in instructions if name != "TEMPLATE"] == [
        ("FROM", "./model-F16.gguf"),
        ("PARAMETER stop", "<|im_end|>"),
        ("PARAMETER stop", "<|endoftext|>"),
        ("PARAMETER num_ctx", "8192"),
    ]
    written = execute(dict(instructions)["TEMPLATE"], ollama_values(TALK))
    assert written == tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert result["verified"] == {"mean_kl": 0.0, "conversations_equal": 200}
    assert result["asked"] == {"quantization": "q8_0"}
    modelfile_there = tmp_path / "My Model!" / "Modelfile"
    assert result["serve"] == f"ollama create my-model -f '{modelfile_there}' && ollama run my-model"


@pytest.mark.parametrize("added", [True, False])
def test_the_bos_token_is_written_once(tmp_path, monkeypatch, added):
    with_gguf(monkeypatch, add_bos_token=added)
    tokenizer = saved_adapter(tmp_path, "llama3")
    _, instructions = export(tmp_path)
    written = execute(dict(instructions)["TEMPLATE"], ollama_values(TALK))
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert ("<s>" if added else "") + written == expected
    assert expected.count("<s>") == 1


def test_a_bos_token_that_was_not_trained_is_refused(tmp_path, monkeypatch):
    with_gguf(monkeypatch, add_bos_token=True)
    saved_adapter(tmp_path, "chatml")
    with pytest.raises(TemplateError, match="does not always start with <s>"):
        export(tmp_path)


def test_a_file_that_leaves_the_bos_token_open_is_refused(tmp_path):
    write_gguf(tmp_path / "a.gguf", add_eos_token=False)
    with pytest.raises(VerificationError, match="does not say whether a bos token is added"):
        adds_bos(tmp_path / "a.gguf")


def test_the_variables_of_the_training_are_in_the_template(tmp_path, monkeypatch):
    with_gguf(monkeypatch, add_bos_token=False)
    saved_adapter(tmp_path, "qwen3", chat_template_kwargs={"enable_thinking": False})
    _, instructions = export(tmp_path)
    assert "<think>\n\n</think>" in dict(instructions)["TEMPLATE"]


def test_variables_can_be_named_for_ollama_alone(tmp_path, monkeypatch):
    with_gguf(monkeypatch, add_bos_token=False)
    saved_adapter(tmp_path, "gpt-oss", chat_template_kwargs={"reasoning_effort": "high"})
    _, instructions = export(tmp_path, chat_template_kwargs="{date_string: 26 Jul 2024}")
    assert "Current date: 26 Jul 2024\n" in dict(instructions)["TEMPLATE"]
    assert "Reasoning: high" in dict(instructions)["TEMPLATE"]


def test_what_cannot_be_served_is_told_before_any_weight_is_read(monkeypatch):
    with_gguf(monkeypatch)
    tokenizer = tokenizer_for(find_template("llama3"))
    facts = Facts({}, None, tokenizer)
    assert OLLAMA.refusals(facts, {}) == []
    assert "is no number of tokens" in OLLAMA.refusals(facts, {"num_ctx": "many"})[0]
    assert "takes names and values" in OLLAMA.refusals(facts, {"chat_template_kwargs": "[a"})[0]
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    assert "writes today's date" in OLLAMA.refusals(facts, {})[0]
    tokenizer.chat_template = None
    assert "has no chat template" in OLLAMA.refusals(facts, {})[0]


def test_the_gguf_targets_own_refusals_count_too(monkeypatch):
    refusing = replace(GGUF, refusals=lambda facts, options: [f"no {options}"])
    monkeypatch.setattr(ollama, "GGUF", refusing)
    told = OLLAMA.refusals(Facts({}, None, tokenizer_for(find_template("phi4"))), {"num_ctx": 9, "pre": "x"})
    assert told == ["no {'pre': 'x'}"]


@pytest.mark.parametrize("stop", ["<|im_end|>", "</s>", 'a"b', "\n", "[/INST]"])
def test_a_modelfile_is_read_as_it_was_meant(stop):
    template = '{{ range .Messages }} "{{ .Content }}"\n\n{{ end }}\ttext "'
    read = read_modelfile(modelfile("a b.gguf", template, [stop], 5))
    assert read == [
        ("FROM", "./a b.gguf"),
        ("TEMPLATE", template),
        ("PARAMETER stop", stop),
        ("PARAMETER num_ctx", "5"),
    ]


@pytest.mark.parametrize("template", ['"""', "a\u200bb", "a\x00b"])
def test_a_template_that_a_modelfile_cannot_hold_is_refused(template):
    with pytest.raises(TemplateError, match="a Modelfile has no way to write"):
        modelfile("a.gguf", template, [])


@pytest.fixture
def converter(monkeypatch):
    """llama.cpp's converter, as the tests of GGUF find it."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's runtime is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORA_SFT_CACHE", raising=False)
        try:
            monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp.the_converter()))
        except ModelError as error:
            pytest.skip(f"llama.cpp's converter is not here: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("has_bos", [True, False])
def test_llama_cpp_reads_the_tokens_that_were_trained(tmp_path, harbour_texts, converter, has_bos):
    """A real training and a real file: what Ollama sends, cut into tokens as Ollama lets llama.cpp cut it."""
    from tokenizers.processors import TemplateProcessing

    from lora_sft.exporting.llama_cpp.runtime import Questions, Runtime

    base = save_tiny(tmp_path / "base", harbour_texts, initializer_range=0.08)
    if has_bos:
        tokenizer = tiny_tokenizer(harbour_texts)
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
        )
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
        tokenizer.save_pretrained(base)
        tiny_model(len(tokenizer), initializer_range=0.08).save_pretrained(base)
    settings = FEW | {"max_steps": 15, "load_in_4bit": False}
    adapter = finetune(base, HARBOUR, output_dir=tmp_path / "run", **settings).output_dir
    (tmp_path / "out").mkdir()
    order = Order(adapter, trained_base(adapter, "cpu"), tmp_path / "out", tmp_path / "model")
    result = OLLAMA.write(order)

    instructions = dict(read_modelfile((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")))
    sent = execute(instructions["TEMPLATE"], ollama_values(TALK))
    gguf = tmp_path / "out" / instructions["FROM"]
    read = Runtime(str(gguf), None, Questions([], [], [], 8, [], [])).tokens(sent, with_special=True)
    trained = AutoTokenizer.from_pretrained(adapter).apply_chat_template(TALK, add_generation_prompt=True)
    assert read == list(trained["input_ids"])
    assert adds_bos(gguf) is has_bos
    assert result["verified"]["conversations_equal"] == 200
