"""Losses, gradients and weights of a running training → nothing while they are sound, else the run's end.

Looked at are: the base and the adapter before the first step; the loss and the gradients of every step, before the
optimizer steps; the adapter before every checkpoint and at the end. On a GPU all that costs one wait an optimizer step.

Two rules tell a learning rate that is far too high, both of them far from what a training that learns ever does:

- *Lost*: on the rows of the run's first micro-batch the model is halfway from where it began to knowing nothing
  (ln of the vocabulary), and a quarter worse than it began. They are run again when the loss of a step is so bad, and
  before every checkpoint: the same rows are compared, so hard data alone cannot set it off.
- *Drowned*: in at least half of the adapted matrices the adapter's update is ten times as large as the matrix.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Kind = Literal["weights", "loss", "gradient", "diverged"]

DROWNED = 10.0
"""Norm of the adapter's update over the norm of the matrix, from which on nothing of the matrix is left."""

ADVICE: Mapping[str, str] = {
    "weights": "a base with such weights cannot be trained: load it again, or in another precision",
    "loss": "look at these rows and at the module; then lower learning_rate, or choose bf16 instead of fp16",
    "gradient": "lower learning_rate, or choose bf16 instead of fp16",
    "diverged": "learning_rate is far too high: divide it by 10 (stop_when_diverging: false trains on regardless)",
}


@dataclass(frozen=True)
class Fault:
    """Why a training cannot go on.

    Attributes:
        kind: what is wrong.
        words: a sentence for a person.
        batch: number of the micro-batch in the step, if one is known to be the cause.
        weights: names of weights that hold NaN or Inf.
    """

    kind: Kind
    words: str
    batch: int | None = None
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class MicroBatch:
    """What is kept of a micro-batch until its step is known to be sound.

    Attributes:
        step: optimizer steps that were taken before it was run.
        number: its place in its step, from 0.
        inputs: its tensors, where the data loader put them.
        token_count: by what its summed loss is divided: supervised tokens of the whole step.
        random: state of the random generators before it was run.
    """

    step: int
    number: int
    inputs: Mapping[str, Any]
    token_count: Any
    random: Mapping[str, Tensor]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The random generators that a forward pass on this device draws from: {"cpu", "cuda"}. Nothing waits for it."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts the generators back to where they were."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def bad_weights(model: Any, trained_only: bool = False) -> list[str]:
    """Names of the weights that hold NaN or Inf; of a quantized one its scales are looked at."""
    scales = {id(module.weight): found for module in model.modules() if (found := _scales_of(module)) is not None}
    named = {
        f"{name}{part}": tensor
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not trained_only
        for part, tensor in _numbers_of(parameter, scales.get(id(parameter))).items()
        if tensor.device.type != "meta" and tensor.numel()
    }
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in named.items():
        by_device.setdefault(tensor.device, []).append(name)
    bad = set()
    for names in by_device.values():  # one wait a device
        sound = torch.stack([_is_finite(named[name]) for name in names]).tolist()
        bad |= {name for name, is_sound in zip(names, sound, strict=True) if not is_sound}
    return [name for name in named if name in bad]


def _scales_of(module: Any) -> Tensor | None:
    """The scales of an 8-bit layer's rows; its first forward pass moves them from the weight to its state."""
    from bitsandbytes.nn import Linear8bitLt

    if not isinstance(module, Linear8bitLt):
        return None
    scales: Tensor | None = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return scales


def _numbers_of(parameter: Tensor, scales: Tensor | None) -> dict[str, Tensor]:
    """What of a weight can be NaN: itself, or the scales of a quantized one (its bits may be stored as any dtype)."""
    state = getattr(parameter, "quant_state", None)
    if state is None and parameter.is_floating_point():
        return {"": parameter.detach()}
    found = {}
    for name, holder in ((" (scales)", state), (" (scales of scales)", getattr(state, "state2", None))):
        if holder is not None and holder.absmax.is_floating_point():
            found[name] = holder.absmax
    if isinstance(offset := getattr(state, "offset", None), Tensor):
        found[" (offset of scales)"] = offset
    if scales is not None:
        found[" (scales)"] = scales
    return found


def _is_finite(tensor: Tensor) -> Tensor:
    """Scalar; reads the tensor once and makes no copy of it. NaN comes through a minimum and a maximum."""
    if tensor.element_size() == 1:  # float8 has neither
        tensor = tensor.float()
    return torch.isfinite(torch.stack(torch.aminmax(tensor))).all()


class Growth:
    """How large the adapter's update of each matrix is, measured by the matrix.

    Plain LoRA on matrices is looked at; DoRA has a length of its own, and other layers no two factors.
    """

    def __init__(self, model: Any) -> None:
        from peft.tuners.lora.layer import LoraLayer

        self._layers = [
            module
            for module in model.modules()
            if isinstance(module, LoraLayer)
            and "default" in module.lora_A
            and not module.use_dora.get("default", False)
            and isinstance(getattr(module.get_base_layer(), "weight", None), Tensor)
            and all(getattr(part["default"].weight, "ndim", 0) == 2 for part in (module.lora_A, module.lora_B))
        ]
        # A start such as PiSSA takes the update out of the matrix: both together are what there was.
        self._starts = [self._update(layer) for layer in self._layers]
        self._sizes: dict[int, Tensor] = {}
        self._turn = 0

    @staticmethod
    @torch.no_grad()
    def _update(layer: Any) -> Tensor:
        """Frobenius norm of scaling · B A, from two (rank, rank) products."""
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        norm: Tensor = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt() * layer.scaling["default"]
        return norm

    def _of(self, place: int) -> Tensor:
        """Update over matrix of one layer, (scalar). The matrix is frozen, so it is measured when it is first asked
        for and no run begins with dequantizing the whole base."""
        layer = self._layers[place]
        if place not in self._sizes:
            self._sizes[place] = _norm(layer.get_base_layer()) + self._starts[place]
        grown: Tensor = self._update(layer) / self._sizes[place]
        return grown

    def of_next(self) -> Tensor | None:
        """Update over matrix, (scalar), of one layer; each time of another. None if there is none to look at."""
        if not self._layers:
            return None
        self._turn = (self._turn + 1) % len(self._layers)
        return self._of(self._turn)

    def of_half(self) -> float:
        """Of all layers, half have grown by at least so much."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for place in range(len(self._layers)):
            grown = self._of(place)
            by_device.setdefault(grown.device, []).append(grown)
        found = [value for some in by_device.values() for value in torch.stack(some).tolist()]  # one wait a device
        values = sorted(value for value in found if not math.isnan(value))
        return values[len(values) // 2] if values else 0.0


@torch.no_grad()
def _norm(layer: Any) -> Tensor:
    """Frobenius norm of a layer's weight (scalar, float64), of a quantized one as it is computed with."""
    weight: Tensor = layer.weight
    state, scales = getattr(weight, "quant_state", None), _scales_of(layer)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    elif scales is not None:
        weight = weight.data.float() * (scales / 127).unsqueeze(-1)
    elif not weight.is_floating_point():
        return torch.tensor(math.inf, dtype=torch.float64, device=weight.device)  # nothing outgrows it
    norm: Tensor = torch.linalg.vector_norm(weight, dtype=torch.float32).double()
    return norm


def lost_from(first_loss: float, vocabulary_size: int) -> float:
    """The loss from which a model counts as lost, in nats a token: the rule at the top of this file."""
    return max((first_loss + math.log(vocabulary_size)) / 2, 1.25 * first_loss)


class Watch(TrainerCallback):
    """Follows a run, and ends it.

    Args:
        model: what is trained, without wrappers of several processes.
        vocabulary_size: of the model.
        on_diverging: whether the two rules end the run; NaN and Inf always do.
        loss_of: (micro-batch, token count) → its loss, as in training.
        over_all: sums of this process → sums of all processes.
        scale: of the gradients in float16 arithmetic, None in any other.
        fail: what to do about a fault; it raises.

    Attributes:
        batches: the micro-batches of the running step so far.
    """

    def __init__(
        self,
        model: Any,
        vocabulary_size: int,
        on_diverging: bool,
        loss_of: Callable[[MicroBatch, Any], Tensor],
        over_all: Callable[..., Sequence[float]],
        scale: Callable[[], float | None],
        fail: Callable[[Fault, Sequence[MicroBatch]], None],
    ) -> None:
        self.model, self.vocabulary_size, self.on_diverging = model, vocabulary_size, on_diverging
        self.loss_of, self.over_all, self.scale, self.fail = loss_of, over_all, scale, fail
        self.batches: list[MicroBatch] = []
        self._losses: list[Tensor] = []
        self._own: Tensor | None = None
        self._growth: Growth | None = None
        self._grown: Tensor | None = None
        self._first: MicroBatch | None = None
        self._first_loss = self._own_loss = 0.0
        self._sound_at = -1

    def keep(self, step: int, inputs: Mapping[str, Any], token_count: Any) -> None:
        """Called before a micro-batch is run, with the number of steps that were taken."""
        random = random_state(self.model.device)
        self.batches.append(MicroBatch(step, len(self.batches), inputs, token_count, random))

    def add(self, loss: Tensor, own_mean: Tensor | None = None) -> None:
        """Called with the loss of that micro-batch; waits for nothing.

        Args:
            loss: as it is differentiated: divided by the tokens of its step.
            own_mean: divided by its own tokens, as `loss_of` gives it without a count. None has the first micro-batch
                of the run computed once more, to know it.
        """
        if not self._losses:
            self._own = None if own_mean is None else own_mean.detach()
        self._losses.append(loss.detach())

    def join(self, parts: int) -> None:
        """The last losses that were added, so many, are those of the parts of one micro-batch."""
        if parts == len(self._losses):
            self._own = None
        self._losses[-parts:] = [torch.stack(self._losses[-parts:]).sum()]

    def begin_again(self) -> None:
        """Forgets the losses of the running step: its micro-batches are computed once more."""
        self._losses, self._own = [], None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at every weight, once."""
        self._first, self._grown, self._sound_at = None, None, -1
        if names := bad_weights(self.model):
            self.fail(Fault("weights", _weights_in_words(names), weights=tuple(names)), [])
        if self.on_diverging:
            self._growth = Growth(self.model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the last step."""
        self.batches, self._losses, self._own = [], [], None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The one look of a step, before its update: losses and gradients, and how far the last update went."""
        gradients = [one.grad for one in self.model.parameters() if one.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        grown = self._grown if self._grown is not None else norm.new_zeros(())
        values = torch.stack([*(one.float() for one in self._losses), norm.float(), grown.to(norm)])
        *losses, norm_now, grown_now = values.tolist()
        self._check_numbers(losses, norm_now, state.global_step + 1)
        if self.on_diverging:
            self._check_loss(sum(losses), state.global_step + 1)
            self._check_growth(grown_now, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures the update; before a checkpoint all that it holds is looked at."""
        if self._growth is not None:
            self._grown = self._growth.of_next()
        if control.should_save:
            self._check_adapter(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As `on_step_end`: checkpoints are also written here."""
        if control.should_save:
            self._check_adapter(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What is saved as the result is looked at too, and nothing is kept any longer."""
        self._check_adapter(state.global_step)
        self.batches, self._losses, self._first, self._growth, self._grown = [], [], None, None, None

    def _check_numbers(self, losses: Sequence[float], norm: float, step: int) -> None:
        """NaN or Inf ends the run, in all processes at the same step."""
        wrong = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        scale = self.scale()
        # float16: the scale of the gradients is found by trying; steps whose gradients overflow are left out.
        searching = scale is not None and scale >= 1
        gradients_wrong = not math.isfinite(norm) and not searching
        wrong_anywhere, gradients_wrong_anywhere = self.over_all(float(bool(wrong)), float(gradients_wrong))
        if wrong_anywhere:
            loss = losses[wrong[0]] if wrong else math.nan
            words = f"the loss of step {step} is {_in_words(loss)}"
            self.fail(Fault("loss", words, wrong[0] if wrong else None), self.batches)
        if gradients_wrong_anywhere:
            words = f"the gradients of step {step} are {_in_words(norm)}, though its loss is a number"
            self.fail(Fault("gradient", words), self.batches)

    def _check_loss(self, here: float, step: int) -> None:
        total, processes = self.over_all(here, 1.0)
        loss = total / processes
        if self._first is None:
            self._first, self._first_loss = self.batches[0], loss
            self._own_loss = self._probe(self._first) if self._own is None else float(self._own)
        elif loss > lost_from(self._first_loss, self.vocabulary_size):
            self._check_lost(step)

    def _check_lost(self, step: int) -> None:
        if self._first is None:
            return
        now, limit = self._probe(self._first), lost_from(self._own_loss, self.vocabulary_size)
        (lost_anywhere,) = self.over_all(float(not now <= limit))
        if lost_anywhere:
            words = (
                f"at step {step} the loss is lost: on the rows of the first micro-batch it is {now:.2f}, and was "
                f"{self._own_loss:.2f} when the run began"
            )
            self.fail(Fault("diverged", words), [self._first])

    def _check_growth(self, grown: float, step: int) -> None:
        if self._growth is None or not grown > DROWNED:
            return
        half = self._growth.of_half()
        if half > DROWNED:
            words = (
                f"after step {step} the adapter's update is {half:,.0f} times as large as the matrices that it adds to"
            )
            self.fail(Fault("diverged", words), self.batches)

    def _check_adapter(self, step: int) -> None:
        """Before anything is written: the weights after the last update, and what the model says with them."""
        if step == self._sound_at or (self._first is None and not self.batches):
            return
        if names := bad_weights(self.model, trained_only=True):
            self.fail(
                Fault("weights", f"after step {step}: {_weights_in_words(names)}", weights=tuple(names)), self.batches
            )
        if self.on_diverging:
            self._check_lost(step)
            if self._growth is not None:
                self._check_growth(self._growth.of_half(), step)
        self._sound_at = step

    @torch.no_grad()
    def _probe(self, batch: MicroBatch) -> float:
        """Mean loss of a micro-batch with the weights of now; the random generators end where they were."""
        before = random_state(self.model.device)
        set_random_state(batch.random, self.model.device)
        try:
            return float(self.loss_of(batch, None))
        finally:
            set_random_state(before, self.model.device)


def _in_words(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinite"


def _weights_in_words(names: Sequence[str]) -> str:
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"NaN or Inf in {some}"
