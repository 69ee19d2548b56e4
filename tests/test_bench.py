"""The bench counts, compares and judges rightly; what it measures is measured in `bench/`, not here."""

import json
import mmap
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bench.training import __main__ as training
from bench.training import plots
from bench.training.curves import distances
from bench.training.floor import work_of_step
from bench.training.meter import Meter
from bench.training.models import write_adapter
from bench.training.race import Step, Taken, race
from bench.training.rows import join, render, sample_conversations, texts_of
from bench.training.side import Side
from bench.training.summary import apart, disagreeing, spread, summarize, table
from lora_sft.model.tiny import save_tiny
from tests.conftest import conversation

NUMBERS = [{"seconds": 1.0, "risen_bytes": 10}, {"seconds": 2.0, "risen_bytes": 20}]
NOWHERE = Path("there/is/no/such/folder")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), texts_of(NOWHERE), vocabulary_size=600)


def taken(*seconds, loss=2.0, peak_bytes=300, supervised=10):
    return Taken(100, [Step(one, peak_bytes, loss, supervised, 20) for one in seconds])


@pytest.mark.parametrize(
    ("config_class", "model_class"), [(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)]
)
def test_the_work_that_is_counted_from_the_shapes_is_what_torch_counts_in_a_real_step(config_class, model_class):
    length, rank = 24, 4
    base = model_class(config_class(**SIZES, attn_implementation="eager"))
    model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(length)[None]).logits.sum().backward()
    counted = work_of_step(SIZES, [length], supervised=length, rank=rank).operations
    whole_square = counted["attention"] * 2 * length / (length + 1)  # eager computes above the diagonal as well
    expected = sum(counted.values()) - counted["attention"] + whole_square
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


def test_two_conversations_are_attended_to_apart():
    together, separate = (work_of_step(SIZES, lengths, supervised=1) for lengths in ([16], [8, 8]))
    assert separate.operations["attention"] < together.operations["attention"]
    assert separate.operations["forward"] == together.operations["forward"]


def test_a_spread_is_the_quartiles():
    values = [3.0, 9.0, 1.0, 4.0, 7.0, 8.0]
    assert spread(values) == pytest.approx(tuple(np.percentile(values, [25, 50, 75])))
    assert spread([5.0]) == (5.0, 5.0, 5.0)


def test_a_side_is_measured_by_the_first_without_the_step_that_warms_up():
    races = [{"TRL": taken(99, 4, 6), "ours": taken(1, 2, 2, peak_bytes=150)}]
    first, ours = summarize(races, same_batches=True)
    assert (first.ratio.middle, first.memory, first.seconds) == (1, 1, 5)
    assert ours.ratio.middle == 2.5
    assert (ours.risen_bytes, ours.memory) == (50, 0.25)
    assert ours.supervised_per_second == 5
    assert "2.50 (2.25–2.75)" in table([first, ours])


def test_other_batches_are_compared_by_supervised_tokens_a_second():
    races = [{"TRL": taken(0, 4, 4), "ours": taken(0, 4, 4, 4, supervised=30)}]
    assert summarize(races, same_batches=False)[1].ratio.middle == 3
    assert summarize(races, same_batches=False)[1].apart is None


@pytest.mark.parametrize(("loss", "complaints"), [(2.0019, 0), (2.0021, 1), (float("nan"), 1)])
def test_losses_that_are_further_apart_than_a_thousandth_are_told(loss, complaints):
    lines = summarize([{"TRL": taken(1, 1), "ours": taken(1, 1, loss=loss)}], same_batches=True)
    assert len(disagreeing(lines)) == complaints


def test_sides_that_saw_other_tokens_are_not_compared():
    with pytest.raises(ValueError, match="not the same batches"):
        apart(taken(1, 1), taken(1, 1, supervised=11))


@pytest.mark.parametrize(("loss", "code"), [(2.0, None), (2.1, 3)])
def test_a_bench_whose_losses_disagree_ends_with_3_and_writes_what_it_measured(
    loss, code, monkeypatch, tmp_path, base, capsys
):
    workload = type("Workload", (), {"described": "some rows"})
    monkeypatch.setattr(training, "shared_by_all", lambda *_: ({"steps": 2, "device": "cpu"} | files(base), workload))
    monkeypatch.setattr(training, "race", lambda sides: {name: taken(1, 1, loss=2.0) for name in sides} | ours)
    ours = {"ours": taken(1, 0.5, loss=loss)}
    words = ["--model", "A", "--data", "alpaca", "--dtype", "fp32", "--json", str(tmp_path / "found.json")]
    if code is None:
        training.main(words)
    else:
        with pytest.raises(SystemExit) as ended:
            training.main(words)
        assert ended.value.code == code
    (case,) = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert case["lines"][1]["ratio"] == {"low": 2, "middle": 2, "high": 2}
    assert len(case["disagreeing"]) == (code is not None)
    assert ("more than 0.001" in capsys.readouterr().out) == (code is not None)


def files(folder):
    return {"model": str(folder), "rows": str(folder / "rows.json"), "adapter": str(folder / "adapter")}


def test_shapes_for_a_gpu_are_left_out_with_a_reason_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(training, "has_cuda", lambda: False)
    assert training.cases_of(training.read_options(["--model", "llama-8b"])) == []
    assert "llama-8b: left out, there is no CUDA device here" in capsys.readouterr().out
    everything = training.cases_of(training.read_options(["--model", "all", "--data", "tools"]))
    assert everything == [("A", "tools"), ("B", "tools"), ("C", "tools")]


@pytest.mark.parametrize(("model", "words"), [("all", "is of one model"), ("qwen3-8b", "no CUDA device")])
def test_a_model_that_cannot_be_measured_is_refused(model, words, monkeypatch):
    monkeypatch.setattr(training, "has_cuda", lambda: False)
    with pytest.raises(SystemExit, match=words):
        training.main(["--floor", "--model", model, "--dtype", "bf16"])


def test_long_documents_are_the_rows_end_to_end():
    rows = [([1, 2, 3], [-100, 2, 3]), ([4, 5], [-100, 5]), ([6, 7, 8], [-100, -100, 8])]
    assert join(rows, 4) == [([1, 2, 3, 4], [-100, 2, 3, -100]), ([5, 6, 7, 8], [5, -100, -100, 8])]


def test_conversations_are_sampled_where_the_files_are_not_there(base, monkeypatch):
    monkeypatch.setattr("bench.training.rows.SAMPLED", 60)
    rows = render("alpaca", base, NOWHERE)
    assert len(rows) == 60
    assert len({len(ids) for ids, _ in rows}) > 30
    assert all(len(ids) == len(labels) and max(labels) >= 0 for ids, labels in rows)
    assert rows == render("alpaca", base, NOWHERE)


def test_sampled_conversations_are_made_of_whole_exchanges():
    exchanges = [{"messages": conversation("hi", "yo")}, {"messages": conversation("bye", "so long")}]
    for sampled in sample_conversations(exchanges, 20):
        pairs = [turn["content"] for turn in sampled["messages"]]
        assert set(zip(pairs[::2], pairs[1::2], strict=True)) <= {("hi", "yo"), ("bye", "so long")}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak cannot be zeroed")
def test_the_meter_sees_memory_that_is_gone_again_and_forgets_it_when_zeroed():
    meter, size = Meter("cpu"), 64 << 20
    meter.zero()
    before = meter.held_bytes()
    with mmap.mmap(-1, size) as block:  # what malloc gives may have been there before
        for _ in range(64):
            block.write(b"x" * (size // 64))
    seconds, peak = meter.read()
    assert peak - before > 0.9 * size
    assert seconds > 0
    meter.zero()
    assert meter.read()[1] - before < 0.5 * size


def test_curves_are_compared_with_how_far_the_seeds_are_apart():
    curves = {
        "TRL": [[3.0, 2.0], [3.0, 2.4], [3.0, 2.2]],
        "TRL, float32 adapter": [[3.0, 2.1], [3.0, 2.5], [3.0, 2.3]],
        "ours": [[3.0, 2.1], [3.0, 2.5], [3.0, 2.3]],
    }
    assert distances(curves) == pytest.approx(
        {
            "between TRL's seeds": (0.4 + 0.2 + 0.2) / 3 / 2,
            "TRL to TRL, float32 adapter": 0.05,
            "TRL to ours": 0.05,
            "TRL, float32 adapter to ours": 0,
        }
    )


def test_every_kind_of_measurement_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    line = {"side": "ours", "ratio": {"low": 1, "middle": 2, "high": 3}, "memory": 0.5}
    plots.plot_races([{"case": "A, alpaca", "lines": [line | {"side": "TRL"}, line]}], tmp_path / "races.svg")
    points = [{"value": rank, "TRL": numbers, "ours": numbers} for rank, numbers in enumerate(NUMBERS, 4)]
    plots.plot_scaling({"rank": points}, tmp_path / "scaling.png")
    curve = {"TRL": [[3, 2], [3, 2.1]], "ours": [[3, 2.2], [3, 2.3]]}
    plots.plot_curves(curve, tmp_path / "curves.png")
    assert "<!-- A, alpaca -->" in (tmp_path / "races.svg").read_text()  # matplotlib names the text that it draws
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("scaling", "curves"))


def test_a_picture_is_refused_before_anything_is_measured_where_it_cannot_be_drawn(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        training.main(["--plot", "picture.png"])


@pytest.mark.slow
def test_both_sides_begin_with_the_same_adapter_and_train_on_the_same_batches(base, tmp_path):
    write_adapter(base, seed=3, rank=4, folder=tmp_path / "adapter")
    (tmp_path / "rows.json").write_text(json.dumps(render("alpaca", base, NOWHERE)[:6]))
    trl = Side(
        "trl",
        str(base),
        str(tmp_path / "rows.json"),
        str(tmp_path / "adapter"),
        dtype="fp32",
        steps=3,
        micro_batch=2,
        keeps_float32=True,
        rank=4,
        seed=3,
    )
    found = race({"TRL": trl, "ours": replace(trl, library="ours"), "other seed": replace(trl, library="ours", seed=4)})
    assert apart(found["TRL"], found["ours"]) < 1e-5
    assert apart(found["TRL"], found["other seed"]) > 2 * apart(found["TRL"], found["ours"])
    assert all(step.seconds > 0 and step.peak_bytes > 0 for side in found.values() for step in side.steps)
