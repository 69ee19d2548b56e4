"""Out of memory: tried before the first step; later the step is computed again in parts, with the same gradients.

The shortage is simulated: a pass forward (or backward) over more tokens than there is room for raises the error of a
GPU. Runs with a shortage are compared with the same run without one.
"""

import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_sft.training.guarding
import lora_sft.training.loss
import lora_sft.training.run
import lora_sft.training.splitting
from lora_sft import finetune
from lora_sft.chat.labels import Example
from lora_sft.errors import RunError
from lora_sft.model.tiny import tiny_model
from lora_sft.training.activations import layers_of
from lora_sft.training.batching import Batching, computed_tokens, plan_batches
from lora_sft.training.evaluation import measure, sum_up
from lora_sft.training.loader import Collator
from lora_sft.training.splitting import parts_of
from lora_sft.training.trainer import Trainer
from tests.conftest import FEW, conversation, logged, sums
from tests.training.test_recompute import EXPERTS, SHAPE
from tests.training.test_resume import SAVED, PowerCutError, adapter, cut_at
from tests.training.test_watch import assert_not_called_final, failure, spoil_loss

RUN = FEW | {
    "load_in_4bit": False,
    "gradient_checkpointing": False,
    "optim": "sgd",
    "learning_rate": 1.0,
    "preflight": False,  # micro-batches are counted
}
"""An update of SGD is as near as its gradient; AdamW makes a large one of a gradient that is 0 but for rounding."""
WORDS = "out of memory on cpu; from now on"


def talks(*lengths: int) -> list[dict]:
    """Conversations that differ, and whose replies are of so many words."""
    return [
        {"messages": conversation(f"what is {n} plus {n}?", f"it is {2 * n}, " + "so it is, " * length)}
        for n, length in enumerate(lengths)
    ]


class Shortage:
    """More than `room` tokens at a time are too many, from the moment on that a training begins.

    Attributes:
        room: tokens for which there is memory; with recomputation of all layers, `room_recomputed`.
        backward: whether it shows in the backward pass, when the first layer's turn comes, and not before.
        in_evaluation: whether there is as little room where no gradient is asked for.
        tried: (tokens, whether they fitted) of each pass.
    """

    def __init__(self, room, backward=False, room_recomputed=None, in_evaluation=False):
        self.room, self.backward, self.in_evaluation = room, backward, in_evaluation
        self.room_recomputed = room if room_recomputed is None else room_recomputed
        self.tried: list[tuple[int, bool]] = []
        self.gradients_at_failure: list[int] = []
        self.is_on = False
        self.trainer = None

    @property
    def errors(self) -> list[int]:
        """Tokens of the passes that were out of memory."""
        return [tokens for tokens, fitted in self.tried if not fitted]

    def is_short(self, model, tokens) -> bool:
        recomputed = all("forward" in vars(layer) for layer in layers_of(model))
        return tokens > (self.room_recomputed if recomputed else self.room)

    def forward(self, model, batch):
        """Called before the model is."""
        asks_gradient = torch.is_grad_enabled()
        if not self.is_on or not (asks_gradient or self.in_evaluation):
            return
        tokens = batch["input_ids"].numel()
        fits = not self.is_short(model, tokens)
        self.tried.append((tokens, fits))
        if not fits and not (self.backward and asks_gradient):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def behind_first_layer(self, layer, inputs, output):
        """Its output has a hook, which is run in the backward pass, when all layers behind it have their gradients."""
        if self.is_on and self.backward and output.requires_grad and not self.tried[-1][1]:
            output.register_hook(self.fail_backward)

    def fail_backward(self, gradient):
        parameters = self.trainer.model.parameters()
        self.gradients_at_failure.append(sum(one.grad is not None for one in parameters))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")


@pytest.fixture
def short(monkeypatch):
    """A shortage comes over the runs that follow: a function of what `Shortage` takes."""
    build, train, inputs_of = lora_sft.training.run.build_trainer, Trainer.train, lora_sft.training.loss.inputs_of
    current = SimpleNamespace(shortage=Shortage(math.inf))

    def build_short(*args, **kwargs):
        trainer = build(*args, **kwargs)
        current.shortage.trainer = trainer
        first_layer = layers_of(trainer.model)[0]
        first_layer.register_forward_hook(lambda *call: current.shortage.behind_first_layer(*call))
        return trainer

    def train_short(self, *args, **kwargs):
        current.shortage.is_on = True
        try:
            return train(self, *args, **kwargs)
        finally:
            current.shortage.is_on = False

    def inputs_of_short(model, batch):
        current.shortage.forward(model, batch)
        return inputs_of(model, batch)

    monkeypatch.setattr(lora_sft.training.run, "build_trainer", build_short)
    monkeypatch.setattr(Trainer, "train", train_short)
    monkeypatch.setattr(lora_sft.training.loss, "inputs_of", inputs_of_short)

    def begin(*args, **kwargs) -> Shortage:
        current.shortage = Shortage(*args, **kwargs)
        return current.shortage

    return begin


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Being out of memory is an error that can be caught, so what is largest is tried first."""
    monkeypatch.setattr(lora_sft.training.splitting, "can_be_caught", lambda device: True)


def same_but_for_rounding(one, other, rtol=1e-5):
    """Adapters and metrics of two runs."""
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    for name in left:
        atol = 0.1 * rtol * float(right[name].abs().max())
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=atol)
    for here, there in zip(*map(timeless, (one, other)), strict=True):
        assert here == pytest.approx(there, rel=10 * rtol)
        assert here.get("num_tokens") == there.get("num_tokens")
        assert here.get("num_supervised_tokens") == there.get("num_supervised_tokens")


def timeless(folder) -> list[dict]:
    """What a run has logged, without the times."""
    return [
        {name: value for name, value in line.items() if "second" not in name and "runtime" not in name}
        for line in logged(folder)
    ]


# --- the same gradients ---------------------------------------------------------------------------------

WAYS = {
    "one row": {},
    "padded": {"fast_kernels": False},
    "packed": {"packing": True, "max_length": 128},
    "packed in several rows": {"packing": True, "max_length": 128, "fast_kernels": False},
    "label smoothing": {"label_smoothing": 0.1},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_split_gives_the_adapter_and_the_numbers_of_one_that_is_not(base, tmp_path, short, way, backward):
    settings = RUN | WAYS[way]
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **settings)
    shortage = short(100, backward)
    split = finetune(base, sums(12), output_dir=tmp_path / "split", **settings)
    assert shortage.errors
    assert len(shortage.gradients_at_failure) == (len(shortage.errors) if backward else 0)
    assert all(shortage.gradients_at_failure), "part of the gradients had been added"
    assert max(tokens for tokens, fitted in shortage.tried if fitted) <= 100
    same_but_for_rounding(whole.output_dir, split.output_dir, rtol=1e-5 if way != "bf16" else 0.1)
    assert split.metrics["split_micro_batches"] > 0
    assert "split_micro_batches" not in whole.metrics
    assert split.metrics["tokens"] == whole.metrics["tokens"]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_what_fails_in_the_middle_of_a_step_counts_nothing_twice(base, tmp_path, short, backward):
    """Micro-batches of 3, 3, 60 and 3 words; the third does not fit, and the two before it are computed again."""
    rows = talks(3, 3, 3, 3, 30, 30, 3, 3)
    settings = RUN | {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "train_sampling_strategy": "sequential",
        "max_steps": 2,
    }
    whole = finetune(base, rows, output_dir=tmp_path / "whole", **settings)
    shortage = short(math.inf)
    finetune(base, rows, output_dir=tmp_path / "counted", **settings)
    first, second, third, last = [tokens for tokens, _ in shortage.tried[:4]]
    shortage = short(third - 1, backward)
    split = finetune(base, rows, output_dir=tmp_path / "split", **settings)
    halves = [(third // 2, True), (third - third // 2, True)]
    assert shortage.tried == [
        *((first, True), (second, True), (third, False)),
        *((first, True), (second, True), *halves, (last, True)),
        *((first, True), (second, True), *halves, (last, True)),  # split ahead
    ]
    same_but_for_rounding(whole.output_dir, split.output_dir)
    assert split.metrics["split_micro_batches"] == 2


def test_halves_that_do_not_fit_are_halved_again(base, tmp_path, short):
    whole = finetune(base, talks(*[20] * 8), output_dir=tmp_path / "whole", **RUN | {"per_device_train_batch_size": 8})
    shortage = short(math.inf)
    settings = RUN | {"per_device_train_batch_size": 8}
    finetune(base, talks(*[20] * 8), output_dir=tmp_path / "counted", **settings)
    one = shortage.tried[0][0] // 8
    shortage = short(one * 2 + 9)
    split = finetune(base, talks(*[20] * 8), output_dir=tmp_path / "split", **settings)
    assert [round(tokens / one) for tokens in shortage.errors] in ([8, 4], [8, 4, 4])  # the halves differ by a token
    assert {round(tokens / one) for tokens, fitted in shortage.tried if fitted} == {2}
    same_but_for_rounding(whole.output_dir, split.output_dir)
    assert split.metrics["split_micro_batches"] == 3


def test_it_is_said_once_and_what_is_as_large_is_split_without_trying(base, tmp_path, short, capfd):
    shortage = short(150)
    finetune(base, sums(12), output_dir=tmp_path / "run", **RUN | {"max_steps": 30})
    assert shortage.errors == sorted(set(shortage.errors), reverse=True), "each is smaller than those before"
    assert len(shortage.tried) == len(shortage.errors) + 30 * 2
    told = [line for line in capfd.readouterr().err.splitlines() if WORDS in line]
    assert told == [
        f"warning: step 1: a micro-batch of {shortage.errors[0]} tokens is out of memory on cpu; from now on those "
        "that are as large are computed in parts, which gives the same gradients"
    ]


def test_micro_batches_that_fit_stay_whole(base, tmp_path, short):
    shortage = short(120)
    settings = RUN | {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "max_steps": 6}
    run = finetune(base, sums(12), output_dir=tmp_path / "run", **settings)
    # Of 78, 126, 107, 108, 128 and 84 tokens.
    assert run.metrics["split_micro_batches"] == 2
    assert len(shortage.errors) == 1
    assert len(shortage.tried) == 6 + 1 + 2


def test_when_memory_is_short_for_the_checks_too_they_are_made_in_parts(base, tmp_path, short):
    """Before every checkpoint the first micro-batch is run again, without gradients."""
    settings = RUN | {"save_strategy": "steps", "save_steps": 1}
    without = short(math.inf)
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **settings)
    shortage = short(100, in_evaluation=True)
    split = finetune(base, sums(12), output_dir=tmp_path / "split", **settings)
    assert len(shortage.tried) > 3 * 2 + len(shortage.errors), "there were such checks"
    assert shortage.trainer.watch._own_loss == pytest.approx(without.trainer.watch._own_loss, rel=1e-5)
    same_but_for_rounding(whole.output_dir, split.output_dir)


def test_what_a_failed_pass_has_computed_is_gone_before_it_is_tried_again(base, tmp_path, short, monkeypatch):
    shortage, kept, found = short(100, backward=True), [], []
    let_go = lora_sft.training.splitting.let_go

    def look(device):
        found.append([one.expired() for one in kept])
        let_go(device)

    monkeypatch.setattr(lora_sft.training.splitting, "let_go", look)
    behind = shortage.behind_first_layer

    def keep(layer, inputs, output):
        kept.append(StorageWeakRef(output.untyped_storage()))
        return behind(layer, inputs, output)

    shortage.behind_first_layer = keep
    finetune(base, sums(12), output_dir=tmp_path / "run", **RUN | {"gradient_accumulation_steps": 2})
    assert found
    assert all(len(some) and all(some) for some in found)


def test_a_number_that_is_none_is_found_in_a_run_that_is_split_too(base, tmp_path, short, monkeypatch):
    """There is no memory to look behind every module of a micro-batch that did not fit; its rows are named all the
    same."""
    rows = talks(*[30] * 4, *[29] * 4)
    settings = RUN | {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    shortage = short(400)
    spoil_loss(monkeypatch, 2 + 2, math.nan)  # two halves, these again beside the second micro-batch, whose first half
    with pytest.raises(RunError, match=r"the loss of step 1 is NaN: micro-batch 2 .*; there was no memory to") as found:
        finetune(base, rows, output_dir=tmp_path / "run", **settings)
    assert len(shortage.errors) == 2 + 1  # and when it was run again
    assert "hardware" not in str(found.value)
    assert [row["example"] for row in failure(tmp_path / "run")["rows"]] == [4, 5, 6, 7]


def test_a_resumed_run_counts_what_was_split_before_it(base, tmp_path, short):
    settings = SAVED | RUN | {"max_steps": 6, "save_strategy": "steps", "lora_dropout": 0.0}
    short(100)
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **settings)
    short(100)
    with pytest.raises(PowerCutError):
        finetune(base, sums(12), output_dir=tmp_path / "run", **settings | cut_at(5))
    resumed = finetune(base, sums(12), output_dir=tmp_path / "run", **settings)
    assert resumed.metrics["split_micro_batches"] == whole.metrics["split_micro_batches"] == 6


def test_the_auxiliary_loss_of_experts_counts_once_however_many_parts_there_are(base, tmp_path, short, monkeypatch):
    """It is no sum over tokens: the mean over the parts is near to it, their sum would be twice as large."""
    shape = SHAPE | EXPERTS | {"vocab_size": 512, "output_router_logits": True}
    compute, steps = Trainer.training_step, []

    def step(self, *args):
        loss = compute(self, *args)
        steps.append(loss.item())
        return loss

    monkeypatch.setattr(Trainer, "training_step", step)
    settings = RUN | {
        "lora_target_modules": ["q_proj", "v_proj"],
        "training_args": {"router_aux_loss_coef": 1000.0},
        "max_steps": 1,
        "stop_when_diverging": False,
    }
    for name, room in (("whole", math.inf), ("split", 100)):
        short(room)
        torch.manual_seed(0)
        model, tokenizer = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)), AutoTokenizer.from_pretrained(base)
        finetune(model, sums(12), tokenizer=tokenizer, output_dir=tmp_path / name, **settings)
    whole, split = steps
    assert whole > 500
    assert split == pytest.approx(whole, rel=0.2)


def test_rows_that_are_not_those_of_the_micro_batch_are_never_trained_on(base, tmp_path, short, monkeypatch):
    """`ignore_data_skip` begins a resumed epoch anew, and what is known of its order is no longer true."""
    rows_of = Trainer.rows_of
    monkeypatch.setattr(Trainer, "rows_of", lambda self, batch: dict([*rows_of(self, batch).items()][::-1]))
    short(100)
    with pytest.raises(RunError, match="The rows of the micro-batch are not known"):
        finetune(base, sums(12), output_dir=tmp_path / "run", **RUN)


# --- one example ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_for_one_example_that_is_too_long_all_layers_are_recomputed_and_not_a_bit_changes(
    base, tmp_path, short, capfd, backward
):
    """With dropout: the micro-batches before it in its step draw the same numbers again."""
    rows = talks(3, 3, 40, 3, 3, 40)
    settings = RUN | {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "train_sampling_strategy": "sequential",
        "lora_dropout": 0.2,
        "neftune_noise_alpha": 5.0,
        "max_steps": 4,
    }
    whole = finetune(base, rows, output_dir=tmp_path / "whole", **settings)
    capfd.readouterr()
    shortage = short(100, backward, room_recomputed=500)
    run = finetune(base, rows, output_dir=tmp_path / "run", **settings)
    assert len(shortage.errors) == 1
    assert adapter(run.output_dir) == adapter(whole.output_dir)
    said = capfd.readouterr().err
    assert said.count(WORDS) == 1
    assert re.search(r"step 1: one example of \d+ tokens is out of memory on cpu; from now on all layers are", said)
    assert "split_micro_batches" not in run.metrics
    assert run.metrics["tokens"] == whole.metrics["tokens"]


def test_a_long_example_among_short_ones_is_first_left_alone_and_then_recomputed(base, tmp_path, short, capfd):
    rows, settings = talks(60, 3, 3, 3), RUN | {"max_steps": 3}
    whole = finetune(base, rows, output_dir=tmp_path / "whole", **settings)
    shortage = short(150, room_recomputed=10_000)
    split = finetune(base, rows, output_dir=tmp_path / "split", **settings)
    assert len(shortage.errors) == 2
    assert capfd.readouterr().err.count(WORDS) == 2
    same_but_for_rounding(whole.output_dir, split.output_dir)
    assert split.metrics["split_micro_batches"] == 1  # recomputed, the others fit as a whole


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_where_nothing_helps_the_run_ends_and_nothing_is_saved(base, tmp_path, short, checkpointing):
    shortage = short(5)
    with pytest.raises(RunError, match=r"out of memory on cpu: one example of .* lower max_length.*2\.00 GiB") as found:
        finetune(base, sums(12), output_dir=tmp_path / "run", **RUN | {"gradient_checkpointing": checkpointing})
    assert found.value.exit_code == 1
    assert len(shortage.errors) == (3 if checkpointing is True else 4)  # 4, 2 and 1 examples, and 1 recomputed
    assert_not_called_final(tmp_path / "run")
    assert logged(tmp_path / "run") == []


def test_several_processes_end_at_once(base, tmp_path, short, monkeypatch):
    shortage, train = short(100), Trainer.train

    def train_as_two(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "num_processes", property(lambda self: 2))
            return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train_as_two)
    with pytest.raises(RunError, match="out of memory on cpu: halve per_device_train_batch_size"):
        finetune(base, sums(12), output_dir=tmp_path / "run", **RUN)
    assert len(shortage.errors) == 1
    assert_not_called_final(tmp_path / "run")


@pytest.mark.slow
def test_when_one_of_two_processes_is_out_of_memory_both_end(base, tmp_path):
    script = tmp_path / "short.py"
    settings = RUN | {"output_dir": str(tmp_path / "run")}
    script.write_text(
        "import os, torch\n"
        "import lora_sft.training.trainer as trainer\n"
        "from lora_sft import finetune\n"
        "forward_loss, count = trainer.forward_loss, iter(range(1000))\n"
        "def loss(*args):\n"
        "    if next(count) == 1 and os.environ['RANK'] == '1':\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "    return forward_loss(*args)\n"
        "trainer.forward_loss = loss\n"
        f"finetune({str(base)!r}, {sums(12)!r}, **{settings!r})\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29623"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*launcher, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "out of memory on cpu: halve per_device_train_batch_size" in done.stderr
    assert_not_called_final(tmp_path / "run")


# --- the largest first ----------------------------------------------------------------------------------

IN_ORDER = RUN | {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "lora_dropout": 0.2}
WITH_EVALUATION = {"eval_dataset": talks(3, 3, 30, 3), "eval_strategy": "steps", "eval_steps": 2}
LONG_LAST = (3, 3, 3, 3, 30, 30)


def test_the_largest_is_run_before_the_first_step_and_changes_not_a_bit(base, tmp_path, short, as_on_a_gpu):
    settings = IN_ORDER | WITH_EVALUATION | {"per_device_eval_batch_size": 2}
    tried = short(math.inf, in_evaluation=True)
    first = finetune(base, talks(*LONG_LAST), output_dir=tmp_path / "first", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_sft.training.splitting, "can_be_caught", lambda device: False)
        plain = short(math.inf, in_evaluation=True)
        without = finetune(base, talks(*LONG_LAST), output_dir=tmp_path / "without", **settings)
    assert adapter(first.output_dir) == adapter(without.output_dir)
    assert tried.tried[2:] == plain.tried
    largest, largest_evaluated = tried.tried[0][0], tried.tried[1][0]
    passes = [tokens for tokens, _ in plain.tried]  # two steps, two evaluation batches, a step and its evaluation
    assert largest == passes[4] == max(passes)
    assert largest_evaluated == passes[3] == max(passes[2:4])
    assert timeless(first.output_dir) == timeless(without.output_dir)


def test_a_resumed_run_tries_it_too_and_changes_not_a_bit(base, tmp_path, short, as_on_a_gpu):
    settings = SAVED | {"gradient_checkpointing": False}
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **settings)
    with pytest.raises(PowerCutError):
        finetune(base, sums(12), output_dir=tmp_path / "run", **settings | cut_at(5))
    tried = short(math.inf)
    finetune(base, sums(12), output_dir=tmp_path / "run", **settings)
    assert len(tried.tried) == 1 + 2  # steps 5 and 6
    assert adapter(tmp_path / "run") == adapter(whole.output_dir)


def test_it_is_not_run_where_the_first_step_is_the_trial(base, tmp_path, short, as_on_a_gpu):
    tried = short(math.inf)
    finetune(base, sums(12), output_dir=tmp_path / "run", **RUN)  # similar lengths together, the largest first
    assert len(tried.tried) == 3
    assert tried.tried[0] == max(tried.tried)


def test_on_the_cpu_nothing_is_tried(base, tmp_path, short):
    tried = short(math.inf, in_evaluation=True)
    finetune(base, talks(*LONG_LAST), output_dir=tmp_path / "run", **IN_ORDER | WITH_EVALUATION)
    passes = [tokens for tokens, _ in tried.tried]
    assert passes[0] == passes[1] < max(passes)
    assert len(passes) == 3 + 2 * 2 + 1  # steps; two evaluations of two batches; a look at the end whether all is well


def test_if_nothing_was_asked_for_the_trial_goes_down_to_full_recomputation(
    base, tmp_path, short, as_on_a_gpu, capfd, monkeypatch
):
    monkeypatch.setattr("lora_sft.training.recompute.free_bytes", lambda device: 1 << 40)  # so it seemed
    settings = IN_ORDER | {"gradient_checkpointing": None}
    whole = finetune(base, talks(*LONG_LAST), output_dir=tmp_path / "whole", **settings)
    shortage = short(150, room_recomputed=10_000)
    run = finetune(base, talks(*LONG_LAST), output_dir=tmp_path / "run", **settings)
    assert [fitted for _, fitted in shortage.tried] == [False, True, True, True, True]
    assert adapter(run.output_dir) == adapter(whole.output_dir)
    said = capfd.readouterr().err
    assert re.search(
        r"before step 1: a micro-batch of \d+ tokens is out of memory on cpu; from now on all layers", said
    )
    assert said.count(WORDS) == 1


def test_else_what_is_as_large_is_split_from_the_start(base, tmp_path, short, as_on_a_gpu, capfd):
    settings = IN_ORDER | {"lora_dropout": 0.0}
    whole = finetune(base, talks(*LONG_LAST), output_dir=tmp_path / "whole", **settings)
    shortage = short(200, backward=True)
    split = finetune(base, talks(*LONG_LAST), output_dir=tmp_path / "split", **settings)
    assert [fitted for _, fitted in shortage.tried] == [False, True, True] + [True] * 4
    same_but_for_rounding(whole.output_dir, split.output_dir)
    said = capfd.readouterr().err
    assert "before step 1: a micro-batch of" in said
    assert said.count(WORDS) == 1
    assert split.metrics["split_micro_batches"] == 1


def test_where_nothing_helps_the_run_ends_before_anything_is_trained(base, tmp_path, short, as_on_a_gpu):
    short(100)  # enough for two steps of three
    with pytest.raises(RunError, match=r"out of memory on cpu: one example of .* lower max_length"):
        finetune(base, talks(*LONG_LAST), output_dir=tmp_path / "run", **IN_ORDER)
    assert logged(tmp_path / "run") == []
    assert_not_called_final(tmp_path / "run")


def test_a_forward_pass_that_is_out_of_memory_when_it_is_measured_is_recomputed(base, tmp_path, monkeypatch, capfd):
    """`gradient_checkpointing` unset: what the largest micro-batch keeps cannot be counted."""
    settings = RUN | {"gradient_checkpointing": None}
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **settings)

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("lora_sft.training.recompute.measure", out_of_memory)
    run = finetune(base, sums(12), output_dir=tmp_path / "run", **settings)
    assert "memory: all layers are recomputed (the forward pass of the largest micro-batch is" in capfd.readouterr().err
    assert adapter(run.output_dir) == adapter(whole.output_dir)


# --- evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_tried", [True, False])
def test_an_evaluation_batch_that_does_not_fit_is_halved_until_it_does(
    base, tmp_path, short, monkeypatch, capfd, is_tried
):
    monkeypatch.setattr(lora_sft.training.splitting, "can_be_caught", lambda device: is_tried)
    settings = RUN | {
        "eval_dataset": talks(*[10] * 6),
        "per_device_eval_batch_size": 6,
        "per_device_train_batch_size": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    whole = finetune(base, talks(3), output_dir=tmp_path / "whole", **settings)
    capfd.readouterr()
    shortage = short(150, in_evaluation=True)
    split = finetune(base, talks(3), output_dir=tmp_path / "split", **settings)
    said = capfd.readouterr().err
    assert len(shortage.errors) == 2  # 6 and 3 at a time, and never again
    assert said.count("evaluation examples at a time are out of memory on cpu") == 2
    assert "3 evaluation examples at a time are out of memory on cpu; from now on it is 1, which gives the same" in said
    same_but_for_rounding(whole.output_dir, split.output_dir)
    steps = [line["step"] for line in logged(split.output_dir) if "loss" in line]
    assert steps == [1, 2, 3]


def test_one_evaluation_example_that_is_too_long_ends_the_run_before_anything_is_trained(
    base, tmp_path, short, as_on_a_gpu
):
    short(200, in_evaluation=True)
    settings = RUN | {"eval_dataset": talks(3, 90), "eval_strategy": "epoch"}
    with pytest.raises(RunError, match="out of memory on cpu"):
        finetune(base, talks(3, 3), output_dir=tmp_path / "run", **settings)
    assert logged(tmp_path / "run") == []


def test_measuring_a_model_goes_on_in_halves_where_it_is(monkeypatch):
    model = tiny_model(512, initializer_range=0.08)
    examples = documents(5, 30, 12, 7, 22, 9, 14)
    one_by_one = measure(model, examples, 0, batch_size=1)
    inputs_of, sizes, told = lora_sft.training.loss.inputs_of, [], []

    def inputs_of_short(model, batch):
        rows = len(batch["input_ids"])
        sizes.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inputs_of(model, batch)

    monkeypatch.setattr(lora_sft.training.loss, "inputs_of", inputs_of_short)
    found = sum_up(model, examples, 0, 5, shrink=told.append)
    assert sizes == [5, 2, 2, 2, 1]
    assert told == [2]
    assert found.tokens == one_by_one["supervised_tokens"]
    assert found.nll / found.tokens == pytest.approx(one_by_one["loss"], rel=1e-6)


# --- the parts ------------------------------------------------------------------------------------------


def documents(*sizes: int) -> list[Example]:
    return [Example(list(range(3, 3 + size)), list(range(3, 3 + size))) for size in sizes]


LAYOUTS = {
    "padded": Batching(4, 60),
    "one row": Batching(4, 60, one_row=True),
    "packed": Batching(4, 60, packing=True, one_row=True),
    "packed in several rows": Batching(4, 60, packing=True),
}
SIZES = [(60,), (9, 9), (60, 3, 3, 3), (30, 29, 50, 9, 60, 20, 20, 20), tuple(range(2, 20))]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_said_to_be_computed_is_the_size_of_the_tensors(layout, sizes):
    batching = LAYOUTS[layout]
    assert computed_tokens(sizes, batching) == Collator(batching, 0)(documents(*sizes))["input_ids"].numel()


@pytest.mark.parametrize("limit", [1, 10, 40, 100, math.inf])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_all_of_it_in_order_and_each_is_below_the_limit_or_one_example(layout, sizes, limit):
    batching, examples = LAYOUTS[layout], documents(*sizes)
    parts = parts_of(examples, batching, limit)
    assert [example for part in parts for example in part] == examples
    for part in parts:
        computed = Collator(batching, 0)(part)["input_ids"].numel()
        assert computed < limit or len(part) == 1


def test_a_half_is_cut_where_the_larger_one_is_smallest():
    """One long row among short ones: padded, it is left alone; end to end the tokens count."""
    long_first = documents(60, 10, 10, 10, 10, 10)
    assert [len(part) for part in parts_of(long_first, LAYOUTS["padded"], 360)] == [1, 5]
    assert [len(part) for part in parts_of(documents(*[10] * 6), LAYOUTS["one row"], 60)] == [3, 3]
    bins = documents(30, 30, 20, 20, 20)
    assert [len(part) for part in parts_of(bins, LAYOUTS["packed in several rows"], 120)] == [2, 3]


def test_rows_of_a_micro_batch_are_found_without_planning_an_epoch_each_time(base, tmp_path, short, monkeypatch):
    planned = []
    monkeypatch.setattr(
        lora_sft.training.guarding, "plan_batches", lambda *args: planned.append(args) or plan_batches(*args)
    )
    short(100)
    run = finetune(base, sums(12), output_dir=tmp_path / "run", **RUN | {"max_steps": 9})
    assert run.metrics["split_micro_batches"] == 9
    assert len(planned) == 3  # epochs
