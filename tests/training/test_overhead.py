"""Between the steps and inside them nothing waits for the device, and nothing is computed before it is needed."""

import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import lora_sft.training.run
from lora_sft import finetune
from lora_sft.chat.labels import Example
from lora_sft.preparation.store import Examples, ExampleWriter
from lora_sft.training.guarding import Guarding
from lora_sft.training.watch import Growth, Watch
from tests.conftest import FEW, HARBOUR, sums

LOOKS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.repeat_interleave.self_Tensor,
}
"""What gives a number, or a shape that depends on numbers: on a GPU all that was asked for before must be computed."""
BY_MASK = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
TO_HOST = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
TO_DEVICE = {torch.Tensor.new_tensor, torch.tensor, torch.as_tensor}
"""A number of Python that is made a tensor on a GPU is copied there, and waited for; `torch.full` is not."""

THE_LOOK = "training/watch.py on_pre_optimizer_step"
HOST_COUNTERS = "torch/optim"
"""The optimizer counts its steps in tensors that lie on the host."""
ON_THE_HOST = {"kernels/attention.py attention_by_document", "kernels/norm.py _is_in"}
"""Ours for the CPU: where documents begin is read from a tensor that lies there, and a weight's smallest value."""
OF_TRANSFORMERS = {"find_packed_sequence_indices", "_ignore_causal_mask_sdpa"}
"""Its `masking_utils.py` asks in every forward pass whether examples are packed, or anything is padded (5.23)."""


def place() -> str:
    """The innermost function of ours that is being run, and, where it called one, the innermost of another library."""
    frames = [frame for frame in traceback.extract_stack() if "tests/" not in frame.filename]
    if any("torch/optim" in frame.filename for frame in frames):
        return HOST_COUNTERS
    known = [frame for frame in frames if "/torch/" not in frame.filename]
    ours = [number for number, frame in enumerate(known) if "lora_sft/" in frame.filename]
    names = [f"{known[ours[-1]].filename.rpartition('lora_sft/')[2]} {known[ours[-1]].name}"] if ours else []
    if not ours or ours[-1] < len(known) - 1:
        names.append(f"{Path(known[-1].filename).name} {known[-1].name}")
    return " > ".join(names)


class Operators(TorchDispatchMode):
    """Notes where a number is taken out of a tensor."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [one for one in (args[1] if func in BY_MASK else ()) if one is not None and one.dtype == torch.bool]
        if (func in LOOKS and not (kwargs or {}).get("output_size")) or masks:
            self.found[place()] += 1
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Notes where a tensor is brought to the host as a whole, or made of numbers that lie there."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in TO_HOST | TO_DEVICE:
            self.found[place()] += 1
        return func(*args, **(kwargs or {}))


class Looking(TrainerCallback):
    """Looks from the start of every step to its end: `of_step[n]` counts the places of step n."""

    def __init__(self):
        self.of_step: list[Counter] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.of_step.append(Counter())
        self.modes = [mode(self.of_step[-1]) for mode in (Operators, Methods)]
        for mode in self.modes:
            mode.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)


@pytest.fixture
def looking(monkeypatch):
    """Every trainer that is built is looked at; what it does between its steps is not."""
    callback, build = Looking(), lora_sft.training.run.build_trainer

    def build_looked_at(*args, **kwargs):
        trainer = build(*args, **kwargs)
        trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr(lora_sft.training.run, "build_trainer", build_looked_at)
    return callback


WAYS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 64},
    "with checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "unquantized": {"load_in_4bit": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_of_three_micro_batches_looks_at_the_device_once(base, tmp_path, looking, way):
    settings = FEW | {"gradient_accumulation_steps": 3, "logging_steps": 100, "warmup_steps": 0} | WAYS[way]
    finetune(base, sums(40), output_dir=tmp_path / "run", **settings)
    assert len(looking.of_step) == 3
    for counts in looking.of_step[1:]:  # the first one also notes from which loss the run sets out
        known = {HOST_COUNTERS} | ON_THE_HOST | OF_TRANSFORMERS
        assert {name: n for name, n in counts.items() if not {name, name.split()[-1]} & known} == {THE_LOOK: 1}


def test_looking_finds_what_waits():
    found: Counter = Counter()
    numbers = torch.arange(4.0)
    with Operators(found), Methods(found):
        numbers.sum().item()
        numbers[numbers > 1]
        numbers.nonzero()
        numbers.tolist()
        if numbers[0] < 1:
            torch.repeat_interleave(torch.arange(2), numbers[:2].long())
        torch.repeat_interleave(torch.arange(2), numbers[:2].long(), output_size=1)
        numbers.new_tensor(3)
    assert sum(found.values()) == 7


class Sent:
    """Stands for transformers' trainer, on a machine with a GPU."""

    args = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    is_deepspeed_enabled = False

    def _prepare_input(self, data):
        return {name: self._prepare_input(value) for name, value in data.items()}

    def _get_num_items_in_batch(self, batch_samples, device):
        return sum((batch["labels"] != -100).sum() for batch in batch_samples).to(device)


class Copies(TorchFunctionMode):
    """Notes what is copied where, and copies nothing."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.to:
            return func(*args, **(kwargs or {}))
        self.seen.append((str(args[1]), kwargs or {}))
        return args[0]


def test_a_micro_batch_and_its_count_go_to_the_gpu_without_waiting():
    class Trainer(Guarding, Sent):
        pass

    batch = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[-100, 6]])}
    with Copies() as copies:
        assert Trainer()._prepare_input(batch)["input_ids"] is batch["input_ids"]
        count = Trainer()._get_num_items_in_batch([batch, batch], torch.device("cuda"))
    assert [one for one in copies.seen if one[0] == "cuda"] == [("cuda", {"non_blocking": True})] * 3
    assert count == 2


# --- the start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_matrix_is_measured_when_it_is_asked_for_as_it_was_at_the_start(base, tmp_path, monkeypatch, init):
    """The share by which each matrix has grown at the end, against the weights before and after, taken plainly."""
    growths, before = [], {}
    begin = Growth.__init__

    def remember(self, model):
        begin(self, model)
        growths.append(self)
        assert not self._sizes  # none is dequantized before the first step
        before.update({id(layer): whole(layer) for layer in self._layers})

    monkeypatch.setattr(Growth, "__init__", remember)
    monkeypatch.setattr(Watch, "on_train_end", lambda *args, **kwargs: None)  # it lets go of what is looked at here
    settings = FEW | {
        "load_in_4bit": False,
        "lora_init": init,
        "preflight": False,
    }  # a plan of the run has one of its own
    finetune(base, HARBOUR, output_dir=tmp_path / "run", **settings)
    (growth,) = growths
    shares = []
    for layer in growth._layers:
        matrix, update = before[id(layer)]
        shares.append(float(whole(layer)[1].norm() / (matrix.norm() + update.norm())))
    assert growth.of_half() == pytest.approx(sorted(shares)[len(shares) // 2], rel=1e-5)
    assert growth.of_half() > 0


def whole(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """(matrix, adapter's update) of a layer, as they are now."""
    with torch.no_grad():
        return layer.get_base_layer().weight.clone(), layer.get_delta_weight("default").clone()


def test_the_loss_that_the_trainer_tells_is_the_one_that_another_pass_gives():
    """`Watch` notes the first micro-batch's own mean loss; told or computed, it is the same number."""
    told, computed = (watch_of(lambda batch, count: torch.tensor(2.5)) for _ in range(2))
    for watch, own in ((told, torch.tensor(2.5)), (computed, None)):
        watch.keep(0, {}, None)
        watch.add(torch.tensor(0.1), own)
        watch.add(torch.tensor(0.2), None if own is None else torch.tensor(9.0))  # of the second one: not noted
        watch._check_loss(0.3, 1)
    assert told._own_loss == computed._own_loss == 2.5


def watch_of(loss_of) -> Watch:
    model = torch.nn.Linear(2, 2)
    model.device = torch.device("cpu")
    return Watch(model, 100, True, loss_of, lambda *numbers: numbers, lambda: None, lambda fault, batches: None)


# --- reading ---------------------------------------------------------------------------------------------


def test_the_arrays_of_an_example_are_its_lists(tmp_path):
    made = [Example([n, n + 1, *range(n % 7)], [-100, n + 1, *range(n % 7)]) for n in range(2300)]
    with ExampleWriter(tmp_path / "examples.arrow") as writer:
        for number, example in enumerate(made):
            writer.add(example, number)
    order = [2299, 0, 999, 1000, 2000, 0, *range(0, 2300, 37)]
    some = Examples(tmp_path / "examples.arrow").select(order)
    for place, number in enumerate(order):
        tokens, labels = some.arrays(place)
        assert (tokens.tolist(), labels.tolist()) == (made[number].input_ids, made[number].labels)
        assert not tokens.flags.writeable
