"""What a plan says, as people and programs ask for it."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig

from lora_sft import plan
from lora_sft.cli import _add_commands, commands
from lora_sft.config import RunConfig
from lora_sft.errors import DataError, ModelError, SettingError
from lora_sft.model.base import BaseSpec, load_base
from lora_sft.model.outline import outline
from lora_sft.planning.account import peak_of
from lora_sft.planning.devices import CARDS, GIB, Device, find_device, read_amount
from lora_sft.planning.families import SIZES, relatives
from lora_sft.planning.plan import make_plan, usable_bytes
from lora_sft.planning.search import choose_settings
from lora_sft.planning.subject import Blueprint
from lora_sft.planning.table import make_table, picture_of
from lora_sft.planning.trial import Recompute, Slopes, try_step
from lora_sft.planning.workload import Workload, read_lengths
from lora_sft.training.batching import Batching
from tests.conftest import HARBOUR, sums
from tests.planning.measured import _storages as storages

SPEC = BaseSpec("nowhere", quantization="nf4", double_quant=True, dtype="bfloat16", device="cuda")
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small(layers: int = 12, **settings) -> Blueprint:
    return Blueprint(LlamaConfig(**SMALL, num_hidden_layers=layers), SPEC, RunConfig(**settings))


def card(mebibytes: float) -> Device:
    return replace(CARDS["rtx4090"], name="a small one", bytes=int(mebibytes * 2**20))


# --- the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "double", "dtype"),
    [(None, False, "float32"), ("nf4", True, "bfloat16"), ("fp4", False, "float32"), ("int8", False, "bfloat16")],
)
def test_an_outline_holds_what_the_loaded_model_holds(base, quantization, double, dtype):
    spec = BaseSpec(str(base), quantization=quantization, double_quant=double, dtype=dtype)
    real, planned = load_base(spec), outline(AutoConfig.from_pretrained(base), spec)
    assert sorted(storages(planned).values()) == sorted(storages(real).values())
    assert [type(module) for module in planned.modules()] == [type(module) for module in real.modules()]
    assert all(parameter.is_meta for parameter in planned.parameters())


def test_two_shallow_models_tell_the_depth_of_the_whole():
    """Bytes and seconds of a deep model are on the line through two shallow ones."""
    blueprint, device = small(24), card(4096)
    batch = Workload.of_lengths([300] * 4, 300).largest(Batching(2, 300, one_row=True))
    slopes = Slopes(blueprint, device, batch)
    for count in (0, 1, 7, 23, 24):
        whole, (told, pace) = try_step(blueprint, device, batch, Recompute(count)), slopes.at(Recompute(count))
        assert told == pytest.approx(whole.peak.allocated * 1.03 + GIB // 2, rel=1e-3)
        assert pace.micro_batch == pytest.approx(whole.pace.micro_batch, rel=1e-3)


def test_layers_of_two_kinds_repeat():
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 5
    shape = Gemma3TextConfig(**SMALL, num_hidden_layers=30, layer_types=kinds)
    blueprint = Blueprint(shape, SPEC, RunConfig())
    assert blueprint.period == 6
    assert blueprint.with_layers(12).shape.layer_types == kinds[:12]
    assert small().period == 1


# --- the verdict ----------------------------------------------------------------------------------------


def test_it_fits_or_it_does_not_by_what_the_device_has():
    work = Workload.of_lengths([200] * 8, 200)
    needed = make_plan(small(gradient_checkpointing=False), work, card(1 << 14)).peak.needed
    for room, fits in ((needed / usable_bytes(card(1 << 14)) * (1 << 14) + 1, True), (needed / 2**20, False)):
        plan = make_plan(small(gradient_checkpointing=False), work, card(room))
        assert plan.fits is fits
        assert plan.settings["gradient_checkpointing"] is False


def test_unset_as_few_layers_are_recomputed_as_it_takes():
    work = Workload.of_lengths([400] * 4, 400)
    with_all = make_plan(small(), work, card(1 << 14))
    assert with_all.settings["gradient_checkpointing"] is False
    tight = card((with_all.peak.needed - 30 * 2**20) / 2**20)
    plan = make_plan(small(), work, tight)
    count = plan.settings["gradient_checkpointing"]
    assert plan.fits
    assert 0 < count < 12
    less = make_plan(small(gradient_checkpointing=count - 2), work, tight)
    assert not less.fits


def test_the_parts_add_up_to_the_peak():
    plan = make_plan(small(), Workload.of_lengths(None, 256), card(4096))
    assert sum(plan.peak.parts.values()) == plan.peak.allocated
    assert plan.peak.allocated <= plan.peak.reserved < plan.peak.needed
    trained = plan.peak.parts["adapter"]
    assert plan.peak.parts["gradients"] == trained
    assert plan.peak.parts["optimizer"] == pytest.approx(2 * trained, rel=0.01)


def test_the_largest_micro_batch_decides_and_the_average_takes_the_time():
    even, uneven = Workload.of_lengths([200] * 64, 800), Workload.of_lengths([200] * 62 + [800] * 2, 800)
    flat, steep = (make_plan(small(gradient_checkpointing=False), work, card(8192)) for work in (even, uneven))
    longest = (800 + 200) / (200 + 200)  # tokens of the largest micro-batch
    assert steep.peak.parts["activations"] == pytest.approx(longest * flat.peak.parts["activations"], rel=0.05)
    assert steep.seconds_per_step < 1.5 * flat.seconds_per_step


def test_an_evaluation_with_larger_batches_decides_too():
    work = Workload.of_lengths([100] * 8, 100)
    with_evaluation = replace(work, evaluation=Workload.of_lengths([2000] * 8, 2000).examples)
    config = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 8, "fast_kernels": False}
    alone, both = (make_plan(small(**config), one, card(8192)).peak.allocated for one in (work, with_evaluation))
    assert both > 2 * alone


def test_what_cannot_be_simulated_is_told_by_a_formula_and_called_uncertain(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("the step reads numbers")

    exact = make_plan(small(), Workload.of_lengths(None, 512), card(8192))
    monkeypatch.setattr("lora_sft.planning.plan.try_step", refuse)
    plan = make_plan(small(), Workload.of_lengths(None, 512), card(8192))
    assert plan.certainty == "uncertain"
    assert any("a formula was used instead" in note for note in plan.assumptions)
    assert plan.peak.allocated == pytest.approx(exact.peak.allocated, rel=0.6)


def test_a_card_without_bfloat16_is_planned_in_float16_without_casts_of_the_base():
    shape, sizes = small(2).shape, {}
    for dtype in ("float16", "bfloat16"):
        blueprint = Blueprint(shape, replace(SPEC, dtype=dtype), RunConfig())
        sizes[dtype] = make_plan(blueprint, Workload.of_lengths([256] * 4, 256), find_device("t4")).peak
    assert sizes["float16"] == sizes["bfloat16"]


def test_other_versions_are_uncertain(monkeypatch):
    monkeypatch.setattr("lora_sft.planning.plan.CHECKED_WITH", {"torch": "1.0"})
    plan = make_plan(small(), Workload.of_lengths(None, 128), card(8192))
    assert plan.certainty == "uncertain"
    assert any("was not compared with its simulation" in note for note in plan.assumptions)


# --- the settings ---------------------------------------------------------------------------------------


def test_auto_keeps_the_batch_of_a_step_and_takes_the_fastest_that_fits():
    plan = choose_settings(small(), Workload.of_lengths([300] * 64, 300), card(1 << 14))
    settings = plan.settings
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == 16
    assert settings["per_device_train_batch_size"] == 16, "all at once is the fastest where there is room"
    assert [rung.chosen for rung in plan.ladder] == [True]


def test_auto_comes_down_the_ladder_as_memory_shrinks():
    work, seen = Workload.of_lengths([600] * 64, 600), []
    blueprint = small(8, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    for room in (2400, 800):
        plan = choose_settings(blueprint, work, card(room))
        assert plan.fits
        chosen = next(rung for rung in plan.ladder if rung.chosen)
        assert chosen.seconds_per_step == min(rung.seconds_per_step for rung in plan.ladder if rung.fits)
        seen.append((chosen.micro_batch, plan.peak.needed))
    assert [size for size, _ in seen] == sorted((size for size, _ in seen), reverse=True)
    assert seen[0][0] > seen[-1][0]
    assert seen[0][1] > seen[-1][1]


def test_auto_takes_a_smaller_optimizer_only_if_nothing_fits_otherwise():
    work = Workload.of_lengths([32] * 8, 32)
    one = small(4, lora_r=256, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    assert choose_settings(one, work, card(1 << 13)).settings["optim"] == "adamw_torch_fused"
    plain, paged = (rung.needed_bytes for rung in choose_settings(one, work, card(1)).ladder)
    between = choose_settings(one, work, card((plain + paged) / 2 / 0.98 / 2**20))
    assert between.settings["optim"] == "paged_adamw_8bit"
    assert between.fits
    assert between.host_bytes > 0


def test_auto_that_finds_nothing_says_what_comes_nearest():
    plan = choose_settings(small(4), Workload.of_lengths([300] * 4, 300), card(520))
    assert not plan.fits
    assert not any(rung.fits for rung in plan.ladder)


# --- devices and lengths --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "4090", "NVIDIA GeForce RTX 4090", "rtx_4090"])
def test_cards_are_found_by_the_names_that_people_write(name):
    assert find_device(name) == replace(CARDS["rtx4090"], name="rtx4090")


def test_amounts_of_memory():
    assert [read_amount(text) for text in ("24GiB", "24", 24, "1.5 G", "512MiB")] == [
        24 * GIB, 24 * GIB, 24 * GIB, 3 * GIB // 2, GIB // 2,
    ]  # fmt: skip
    assert read_amount("24GB") == 24 * 10**9
    assert find_device("t4", "8GiB").bytes == 8 * GIB
    assert find_device("t4").dtype == torch.float16
    for wrong in ("much", "0", "-4GiB", "4TiB"):
        with pytest.raises(SettingError, match="is no amount of memory; write 24GiB, 24GB or 24"):
            find_device(vram=wrong)
    with pytest.raises(SettingError, match="gpu: rtx1 is none that is known; use rtx3060"):
        find_device("rtx1")


def test_lengths_as_they_are_written():
    assert read_lengths("200, 512x3,8") == [200, 512, 512, 512, 8]
    for wrong in ("many", "", "5xx", "1.5"):
        with pytest.raises(SettingError, match="write 200,512,2048 or 512x1000"):
            read_lengths(wrong)
    with pytest.raises(SettingError, match="all are above max_length 100"):
        Workload.of_lengths([200], 100)
    with pytest.raises(SettingError, match="1 is no number of tokens"):
        Workload.of_lengths([1], 100)


# --- the verb and the command ---------------------------------------------------------------------------


def run(*words):
    _add_commands()
    return CliRunner().invoke(commands, ["plan", *map(str, words)], catch_exceptions=False)


def test_from_python_with_data(base):
    found = plan(base, sums(12), gpu="rtx4090", per_device_train_batch_size=2)
    assert found.fits
    assert found.steps_per_epoch == 1
    assert "12 examples of the data" in found.assumptions[0]


def test_a_configuration_is_enough(tmp_path):
    LlamaConfig(**SMALL, num_hidden_layers=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "m")
    assert plan(tmp_path / "m", gpu="rtx3060").fits
    assert plan(tmp_path / "m", vram="600MiB", lengths=[512] * 4, max_length=512).steps_per_epoch == 1
    with pytest.raises(ModelError, match="this folder has no config"):
        plan(tmp_path, gpu="rtx3060")
    with pytest.raises(SettingError, match="lengths and dataset are both given"):
        plan(tmp_path / "m", HARBOUR, lengths=[3], gpu="rtx3060")


def test_a_loaded_model_is_planned_as_it_is(base):
    spec = BaseSpec(str(base), quantization="nf4", double_quant=True)
    given = plan(load_base(spec), device="cpu", lengths=[64, 64])
    named = plan(base, device="cpu", lengths=[64, 64])
    assert given.peak == named.peak


def test_the_document_is_the_contract(base):
    result = run("--model", base, "--dataset", HARBOUR, "--gpu", "rtx4090", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert {"fits", "peak_bytes", "breakdown", "settings", "seconds_per_step", "assumptions"} <= found.keys()
    assert sum(found["breakdown"].values()) == found["peak_bytes"]
    low, high = found["seconds_per_step_range"]
    assert low < found["seconds_per_step"] < high


def test_a_run_that_does_not_fit_is_exit_code_3(base):
    result = run("--model", base, "--vram", "500MiB", "--auto")
    assert result.exit_code == 3
    assert "does not fit" in result.stdout
    assert "settings that were looked at" in result.stdout


def test_options_that_would_have_no_effect_are_refused(base):
    for words, why in (
        (["--picture", "x.svg", "--gpu", "t4"], "picture: draws the table; add --table"),
        (
            ["--table", "--gpu", "t4", "--lengths", "5"],
            "table: tells all cards and lengths; leave out --lengths, --gpu",
        ),
    ):
        with pytest.raises(SettingError, match=why):
            run("--model", base, *words)
    with pytest.raises(DataError, match="the longest example has 9999 tokens, the model 4096 positions"):
        plan(base, lengths=[9999], max_length=9999, gpu="t4")


def test_calibration_takes_real_steps_here(base):
    found = plan(base, HARBOUR, device="cpu", calibrate=True)
    assert found.unsure == 0.1
    assert any("as ten real steps took" in note for note in found.assumptions)
    with pytest.raises(SettingError, match="real steps can be taken on this machine only"):
        plan(base, HARBOUR, gpu="rtx4090", calibrate=True)


# --- the table ------------------------------------------------------------------------------------------


def test_a_table_of_a_family(tmp_path):
    blueprint = small()
    table = make_table(replace(blueprint, shape=LlamaConfig(**SMALL, num_hidden_layers=4)), [512, 1024], ["rtx4060"])
    assert list(table.needed) == list(SIZES["llama"])
    assert all(row[0] < row[1] for row in table.needed.values())
    assert table.longest("1B", "rtx4060") == 1024
    assert table.longest("70B", "rtx4060") is None
    drawn = picture_of(table)
    assert drawn.startswith("<svg")
    assert drawn.count("<rect") == 4 * 2 + 2
    assert list(relatives(Gemma3TextConfig(**SMALL))) == ["this one"]


def test_peaks_are_never_told_below_what_tensors_hold():
    """Rounding, context and workspaces only ever add."""
    from tests.planning.measured import HERE, Case, simulated

    found = simulated(Case("llama", "nf4", "bfloat16", {}, (40, 30), {"num_hidden_layers": 2}))
    assert peak_of(found, CARDS["h100"]).allocated > peak_of(found, HERE).allocated
