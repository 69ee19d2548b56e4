"""Numbers that are none, and losses that explode, end a run in the step in which they come; what was good stays."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import lora_sft.training.trainer
from lora_sft import finetune
from lora_sft.data.sources import read_rows
from lora_sft.errors import RunError
from lora_sft.model.tiny import tiny_model
from lora_sft.training.guarding import Guarding
from lora_sft.training.modules import first_bad, look_behind_modules
from lora_sft.training.watch import bad_weights, lost_from
from tests.conftest import FEW, HARBOUR, logged

RUN = FEW | {
    "max_steps": 4,
    "gradient_accumulation_steps": 3,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
}
"""28 rows: 7 micro-batches an epoch, so that steps have 3, 3, 1 and 3 of them."""
COUNTED = RUN | {"preflight": False}
"""Its micro-batches are counted."""
STEP_OF = (1, 1, 1, 2, 2, 2, 3, 4, 4, 4)


def spoil(base, folder, change):
    """A copy of a base with other weights."""
    folder.mkdir(parents=True)
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def failure(folder) -> dict:
    return json.loads((folder / "failure" / "failure.json").read_text())


def checkpoints(folder) -> list[str]:
    return [one.name for one in folder.glob("checkpoint-*")]


def assert_not_called_final(folder):
    assert not {"adapter_model.safetensors", "manifest.json", "README.md"} & {one.name for one in folder.iterdir()}


@pytest.fixture(scope="module")
def clean(base, tmp_path_factory):
    """The run that nothing happens to, every checkpoint kept."""
    folder = tmp_path_factory.mktemp("runs") / "clean"
    return finetune(base, HARBOUR, output_dir=folder, **RUN | {"save_total_limit": None}).output_dir


@pytest.fixture(scope="module")
def knowing_base(base, tmp_path_factory):
    """A tiny model that was trained on the conversations as a whole: it has something to lose."""
    from lora_sft.data.formats import to_conversations

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [
        tokenizer.apply_chat_template(row.messages, return_tensors="pt", return_dict=True)["input_ids"]
        for row in to_conversations(read_rows(HARBOUR))
    ]
    model = tiny_model(len(tokenizer), initializer_range=0.08).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    torch.manual_seed(0)
    for ids in rows * 8:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("knowing") / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- the base ------------------------------------------------------------------------------------------

WEIGHTS = {
    "embed_tokens": "model.embed_tokens.weight",
    "input_layernorm": "model.layers.1.input_layernorm.weight",
    "q_proj": "model.layers.0.self_attn.q_proj.weight",
    "down_proj": "model.layers.1.mlp.down_proj.weight",
    "lm_head": "lm_head.weight",
}
PRECISIONS = {
    "float32": {"load_in_4bit": False},
    "bf16": {"load_in_4bit": False, "bf16": True},
    "nf4": {},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_weight_of_the_base_is_found_before_the_first_step(base, tmp_path, precision, weight, value):
    def change(tensors):
        tensors[WEIGHTS[weight]].flatten()[77 % tensors[WEIGHTS[weight]].numel()] = value

    bad = spoil(base, tmp_path / "bad", change)
    with pytest.raises(RunError, match=f"NaN or Inf in .*{weight}"):
        finetune(bad, HARBOUR, output_dir=tmp_path / "run", **RUN | PRECISIONS[precision])
    assert checkpoints(tmp_path / "run") == []
    assert_not_called_final(tmp_path / "run")
    assert logged(tmp_path / "run") == []
    told = failure(tmp_path / "run")
    assert (told["kind"], told["after_step"]) == ("weights", 0)
    assert WEIGHTS[weight].removeprefix("model.").removesuffix(".weight") in told["weights"][0]


def test_a_bad_weight_is_told_with_its_name_and_the_module_that_it_spoils(base, tmp_path):
    bad = spoil(base, tmp_path / "bad", lambda tensors: tensors[WEIGHTS["down_proj"]].fill_(math.nan))
    with pytest.raises(RunError, match=r"NaN or Inf in .*layers.1.mlp.down_proj.*NaN or Inf is in the output of"):
        finetune(bad, HARBOUR, output_dir=tmp_path / "run", **RUN)
    assert failure(tmp_path / "run")["first"]["module"].endswith("layers.1.mlp.down_proj.base_layer")


def test_sound_weights_of_every_kind_are_sound():
    model = tiny_model(300)
    assert bad_weights(model.to(torch.bfloat16)) == []
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.finfo(torch.bfloat16).max  # large, but a number
    assert bad_weights(model) == []


# --- loss and gradients --------------------------------------------------------------------------------


def spoil_loss(monkeypatch, micro_batch, value):
    """The loss of one micro-batch is multiplied."""
    count, forward_loss = itertools.count(), lora_sft.training.trainer.forward_loss
    ran = []

    def loss(model, batch, *others):
        found, output = forward_loss(model, batch, *others)
        if next(count) == micro_batch:
            ran.append(batch["input_ids"])
            found = found._replace(value=found.value * value)
        return found, output

    monkeypatch.setattr(lora_sft.training.trainer, "forward_loss", loss)
    return ran


def spoil_gradient(monkeypatch, micro_batch, value):
    """A gradient of one micro-batch becomes something else; its loss stays."""
    count, training_step = itertools.count(), Guarding.training_step
    ran = []

    def step(self, model, inputs, *args):
        if next(count) != micro_batch:
            return training_step(self, model, inputs, *args)
        ran.append(inputs["input_ids"])
        weight = next(one for name, one in model.named_parameters() if "lora_B" in name)
        hook = weight.register_hook(lambda gradient: torch.full_like(gradient, value))
        try:
            return training_step(self, model, inputs, *args)
        finally:
            hook.remove()

    monkeypatch.setattr(Guarding, "training_step", step)
    return ran


def check_stopped(folder, clean, step, kind):
    """The run ended in a step: nothing of it was stepped or saved, and the checkpoint before is that of a clean run."""
    told = failure(folder)
    assert (told["kind"], told["after_step"]) == (kind, step - 1)
    assert_not_called_final(folder)
    assert checkpoints(folder) == ([f"checkpoint-{step - 1}"] if step > 1 else [])
    assert [line["step"] for line in logged(folder)] == list(range(1, step))
    assert all(math.isfinite(line["loss"]) for line in logged(folder))
    kept = load_file(folder / "failure/adapter/adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    if step > 1:
        good = load_file(clean / f"checkpoint-{step - 1}" / "adapter_model.safetensors")
        assert all(torch.equal(good[name], kept[name]) for name in good)
        saved = load_file(folder / f"checkpoint-{step - 1}" / "adapter_model.safetensors")
        assert all(torch.equal(good[name], saved[name]) for name in good)


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("micro_batch", range(10))
def test_a_loss_that_is_no_number_ends_the_run_in_its_step(base, clean, tmp_path, monkeypatch, micro_batch, value):
    ran = spoil_loss(monkeypatch, micro_batch, value)
    step = STEP_OF[micro_batch]
    with pytest.raises(RunError, match=f"the loss of step {step} is (NaN|infinite)"):
        finetune(base, HARBOUR, output_dir=tmp_path / "run", **COUNTED)
    check_stopped(tmp_path / "run", clean, step, "loss")
    # The micro-batch that is kept is the one that was spoilt, and its rows are those with its tokens.
    kept = load_file(tmp_path / "run/failure/batch.safetensors")
    assert torch.equal(kept["input_ids"], ran[0])
    assert failure(tmp_path / "run")["micro_batch"] == micro_batch - STEP_OF.index(step)
    check_rows(tmp_path / "run", base, kept)


@pytest.mark.slow
@pytest.mark.parametrize(("value", "max_grad_norm"), [(math.nan, 1.0), (math.inf, 0.0)])
@pytest.mark.parametrize("micro_batch", range(10))
def test_a_gradient_that_is_no_number_is_never_stepped(
    base, clean, tmp_path, monkeypatch, micro_batch, value, max_grad_norm
):
    spoil_gradient(monkeypatch, micro_batch, value)
    step = STEP_OF[micro_batch]
    settings = COUNTED | {"max_grad_norm": max_grad_norm}
    with pytest.raises(RunError, match=f"the gradients of step {step} are (NaN|infinite), though its loss is a number"):
        finetune(base, HARBOUR, output_dir=tmp_path / "run", **settings)
    if max_grad_norm or step == 1:  # without clipping the clean run is another
        check_stopped(tmp_path / "run", clean, step, "gradient")
    assert checkpoints(tmp_path / "run") == ([f"checkpoint-{step - 1}"] if step > 1 else [])
    assert_not_called_final(tmp_path / "run")


def check_rows(folder, base, batch):
    """The rows that are named hold, as text, what the micro-batch holds as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [row.source for row in read_rows(HARBOUR)]
    rows = failure(folder)["rows"]
    contents = {row.source: row.value for row in read_rows(HARBOUR)}
    decoded = tokenizer.batch_decode(batch["input_ids"])
    assert rows
    assert {row["source"] for row in rows} <= set(texts)
    for row in rows:
        messages = contents[row["source"]]["messages"]
        assert any(all(message["content"] in text for message in messages) for text in decoded), row


@pytest.mark.parametrize("spoiling", [spoil_loss, spoil_gradient])
def test_a_number_that_is_none_stops_the_run_and_it_can_go_on_to_the_same_result(
    base, clean, tmp_path, monkeypatch, spoiling
):
    """The fault of a moment (here: in our test, else of the hardware) costs no step."""
    with monkeypatch.context() as patch:
        spoiling(patch, 7, math.nan)
        with pytest.raises(RunError, match="look at the hardware too"):
            finetune(base, HARBOUR, output_dir=tmp_path / "run", **COUNTED)
    check_stopped(tmp_path / "run", clean, 4, "loss" if spoiling is spoil_loss else "gradient")
    run = finetune(base, HARBOUR, output_dir=tmp_path / "run", **RUN | {"resume_from_checkpoint": True})
    assert (run.output_dir / "adapter_model.safetensors").read_bytes() == (
        clean / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("packing", [False, True])
def test_rows_are_named_in_a_packed_micro_batch_too(base, tmp_path, monkeypatch, packing):
    ran = spoil_loss(monkeypatch, 4, math.nan)
    with pytest.raises(RunError):
        finetune(base, HARBOUR, output_dir=tmp_path / "run", **COUNTED | {"packing": packing, "max_length": 256})
    kept = load_file(tmp_path / "run/failure/batch.safetensors")
    assert torch.equal(kept["input_ids"], ran[0])
    check_rows(tmp_path / "run", base, kept)
    assert "position_ids" in kept  # end to end in one row, packed or not


def test_a_folder_of_somebody_else_is_not_overwritten(base, tmp_path, monkeypatch, capsys):
    class Mine:
        """Puts a file where a failed step would be kept."""

        def started(self, total_steps, first_step):
            (tmp_path / "run/failure").mkdir()
            (tmp_path / "run/failure/thesis.txt").write_text("precious")

        def stepped(self, step): ...
        def logged(self, step, metrics): ...
        def ended(self): ...

    spoil_loss(monkeypatch, 0, math.nan)
    with pytest.raises(RunError, match="the loss of step 1 is NaN"):
        finetune(base, HARBOUR, output_dir=tmp_path / "run", **COUNTED | {"listeners": [Mine()]})
    assert [one.name for one in (tmp_path / "run/failure").iterdir()] == ["thesis.txt"]
    assert "failure: cannot be written: it holds something else" in capsys.readouterr().err


# --- a learning rate that is far too high --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [0.3, 1, 10, 1e3, 1e10, 1e30, 1e38])
@pytest.mark.parametrize("precision", ["float32", "nf4"])
@pytest.mark.parametrize("has_learned", [False, True])
def test_a_learning_rate_that_is_far_too_high_ends_the_run_within_three_steps(
    base, knowing_base, tmp_path, learning_rate, precision, has_learned
):
    settings = RUN | PRECISIONS[precision] | {"learning_rate": learning_rate, "max_steps": 8}
    with pytest.raises(RunError, match="learning_rate"):
        finetune(knowing_base if has_learned else base, HARBOUR, output_dir=tmp_path / "run", **settings)
    assert_not_called_final(tmp_path / "run")
    assert failure(tmp_path / "run")["after_step"] <= 2
    if has_learned or learning_rate >= 1:
        assert checkpoints(tmp_path / "run") == []  # the first update was bad, and it was seen before it was saved


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [0.3, 10, 1e6, 1e30])
def test_good_checkpoints_stay_when_the_loss_explodes_later(knowing_base, tmp_path, monkeypatch, learning_rate):
    trainers = []
    guard = Guarding.guard
    monkeypatch.setattr(Guarding, "guard", lambda self, *given: (trainers.append(self), guard(self, *given))[1])

    class Sabotage:
        """Raises the learning rate after the second step."""

        def stepped(self, step):
            if step >= 2:
                trainers[0].optimizer.param_groups[0]["lr"] = learning_rate

        def started(self, total_steps, first_step): ...
        def logged(self, step, metrics): ...
        def ended(self): ...

    settings = RUN | {"max_steps": 20, "listeners": [Sabotage()]}
    with pytest.raises(RunError, match="learning_rate"):
        finetune(knowing_base, HARBOUR, output_dir=tmp_path / "run", **settings)
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    saved = load_file(tmp_path / "run/checkpoint-2/adapter_model.safetensors")
    assert max(tensor.abs().max() for tensor in saved.values()) < 0.5
    assert_not_called_final(tmp_path / "run")


def test_a_learning_rate_of_ten_is_told_to_be_too_high_and_can_be_had_all_the_same(knowing_base, tmp_path):
    settings = FEW | {"learning_rate": 10}
    with pytest.raises(RunError, match=r"the loss is lost.*divide it by 10 \(stop_when_diverging: false"):
        finetune(knowing_base, HARBOUR, output_dir=tmp_path / "run", **settings)
    run = finetune(knowing_base, HARBOUR, output_dir=tmp_path / "wanted", **settings, stop_when_diverging=False)
    assert run.metrics["steps"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"learning_rate": 2e-4},
        {"learning_rate": 1e-2},
        {"learning_rate": 1e-2, "use_rslora": True, "lora_r": 32},
        {"learning_rate": 5e-3, "use_dora": True, "load_in_4bit": False},
        {"learning_rate": 5e-3, "lora_init": "pissa", "load_in_4bit": False},
        {"learning_rate": 5e-3, "lora_init": "eva", "load_in_4bit": False},
        {"learning_rate": 1e-3, "loraplus_lr_ratio": 16},
        {"learning_rate": 5e-3, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"},
        {"learning_rate": 5e-3, "packing": True, "max_length": 256},
        {"learning_rate": 5e-3, "lora_modules_to_save": ["lm_head"]},
        {"learning_rate": 5e-3, "neftune_noise_alpha": 5.0, "lora_dropout": 0.2},
        {"learning_rate": 5e-3, "bf16": True},
    ],
    ids=str,
)
def test_what_learns_is_never_stopped(base, tmp_path, settings):
    learn(base, tmp_path / "run", **settings)


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [2e-4, 1e-3, 1e-2])
def test_what_has_learned_before_is_never_stopped_either(knowing_base, tmp_path, learning_rate):
    learn(knowing_base, tmp_path / "run", learning_rate=learning_rate)


def learn(base, folder, **settings):
    saving = {"max_steps": 25, "save_strategy": "steps", "save_steps": 5}
    run = finetune(base, HARBOUR, output_dir=folder, **FEW | saving | settings)
    assert run.metrics["steps"] == 25
    assert not (folder / "failure").exists()


def test_watching_changes_not_a_bit(base, tmp_path, monkeypatch):
    settings = RUN | {"lora_dropout": 0.1, "neftune_noise_alpha": 5.0}
    watched = finetune(base, HARBOUR, output_dir=tmp_path / "watched", **settings)
    monkeypatch.setattr(Guarding, "guard", lambda self, *given: setattr(self, "_stop", _Nothing()))
    alone = finetune(base, HARBOUR, output_dir=tmp_path / "alone", **settings)
    assert (watched.output_dir / "adapter_model.safetensors").read_bytes() == (
        alone.output_dir / "adapter_model.safetensors"
    ).read_bytes()


class _Nothing:
    """In place of who listens to signals."""

    signum = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def test_the_rule_of_a_lost_loss_by_hand():
    """Halfway to ln(vocabulary), and at least a quarter worse than at the start."""
    assert lost_from(1.5, 151_936) == pytest.approx((1.5 + 11.931) / 2, abs=1e-3)
    assert lost_from(6.4, 512) == pytest.approx(8.0)


# --- the look behind the modules -----------------------------------------------------------------------


def test_the_first_bad_module_is_the_one_that_was_spoilt():
    model = tiny_model(300).train()
    ids = torch.arange(3, 23)[None]
    names = [name for name, module in model.named_modules() if name and not list(module.children())]
    for name in names:
        hook = model.get_submodule(name).register_forward_hook(_spoil_token_seven)
        _, looks = look_behind_modules(model, lambda: model(input_ids=ids, labels=ids).loss)
        hook.remove()
        bad = first_bad(looks)
        assert bad is not None
        assert bad.direction == "forward"
        if name != "model.rotary_emb":  # its result has no row of the micro-batch
            assert (bad.module, bad.row, bad.token) == (name, 0, 7)


def _spoil_token_seven(module, inputs, output):
    if isinstance(output, tuple):
        return tuple(_spoil_token_seven(module, inputs, part) for part in output)
    output = output.clone()
    output[:, 7] = math.nan
    return output


class _Root(torch.nn.Module):
    """A number for every number, but at 0 an infinite slope."""

    def forward(self, values):
        return values.abs().sqrt()


def test_a_slope_that_is_no_number_is_found_in_the_backward_pass():
    """The output of `first` is 0, its root too; the gradient that comes back to `first` is Inf times 0, so NaN."""
    model = torch.nn.Sequential()
    model.add_module("first", torch.nn.Linear(3, 3))
    model.add_module("root", _Root())
    model.add_module("last", torch.nn.Linear(3, 1))
    torch.nn.init.zeros_(model.first.weight)
    torch.nn.init.zeros_(model.first.bias)
    loss, looks = look_behind_modules(model, lambda: model(torch.ones(2, 3)).sum())
    assert math.isfinite(loss)
    assert [(look.module, look.direction) for look in looks if look.not_finite] == [
        ("first", "backward"),
        ("first.weight", "gradient"),
        ("first.bias", "gradient"),
    ]
    assert all(parameter.grad is None for parameter in model.parameters())


# --- two processes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_one_of_two_processes_meets_ends_both_and_is_told(base, tmp_path):
    script = tmp_path / "spoilt.py"
    words = {**COUNTED, "model": base, "dataset": HARBOUR, "output_dir": tmp_path / "run"}
    words["gradient_accumulation_steps"] = 1
    script.write_text(
        "import math, os\n"
        "import lora_sft.training.trainer as trainer\n"
        "from lora_sft.cli import main\n"
        "forward_loss, count = trainer.forward_loss, iter(range(1000))\n"
        "def loss(*args):\n"
        "    found, output = forward_loss(*args)\n"
        "    is_bad = next(count) == 2 and os.environ['RANK'] == '1'\n"
        "    return found._replace(value=found.value * math.nan) if is_bad else found, output\n"
        "trainer.forward_loss = loss\n"
        f"main({['train', *(f'{name}={value}' for name, value in words.items() if name != 'listeners')]!r})\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29619"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*launcher, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "the loss of step 3 is NaN" in done.stderr
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    assert_not_called_final(tmp_path / "run")
    told = failure(tmp_path / "run")
    assert (told["process"], told["step"]) == (1, 3)
    assert all(row["source"] in done.stderr for row in told["rows"])
