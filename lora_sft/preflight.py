"""A run before its first step → proofs, on its own model and rows, that it will do what it says.

Each is a line with its number. What does not hold ends the run, before anything is written that stays. Model, random
generators and counters are left as they were, so that a run is the same to the bit with the proofs and without.
"""

import math
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from lora_sft.chat import IGNORED
from lora_sft.chat.labels import Example
from lora_sft.console import console, is_main_process, say, table_of
from lora_sft.errors import ModelError, VerificationError
from lora_sft.kernels.swap import left_as_it_was
from lora_sft.model.adapter import adapted_module, count_parameters
from lora_sft.model.disk import free_bytes
from lora_sft.model.fingerprint import stored_bytes
from lora_sft.model.loading import put_adapter
from lora_sft.model.twin import twin
from lora_sft.training.evaluation import pad
from lora_sft.training.fast import ROUNDING, Distance, Measured, filled, shortened
from lora_sft.training.loader import Collator, Rows
from lora_sft.training.rehearsal import Rehearsal, Step, rehearsing
from lora_sft.training.run import Ready
from lora_sft.training.state import trained_tensors

TOKENS = 32
"""Of each of the two rows on which gradients and logits are compared, at most."""

ROWS_LOOKED_AT = 2000
"""Spread over the data, to see how they end."""

NOISE_FACTOR = 4.0
"""How much more than what an idle row beside them does to the gradients is still taken for rounding."""

TOO_NOISY = 0.5
"""Gradients that rounding moves so far, relatively, prove nothing: a wrong division by the tokens moves them as far."""

SCRATCH = ".part"
"""In the output folder, where the adapter is saved and loaded once; `OutputFolder.fill` clears what a kill leaves."""

MARKS = {True: ("holds", "green"), None: ("—", "dim"), False: ("fails", "bold red")}


class Proof(NamedTuple):
    """What was proven.

    Attributes:
        name: in a few words.
        words: the number, or why there is none.
        holds: None: it does not apply, or it is told and nothing follows from it.
        advice: what to do if it does not hold.
    """

    name: str
    words: str
    holds: bool | None
    advice: str = ""

    def record(self) -> dict[str, Any]:
        """As it is kept in `start.json` and `manifest.json`."""
        return {"name": self.name, "words": self.words, "holds": self.holds}


def preflight(ready: Ready) -> list[dict[str, Any]]:
    """Makes every proof, shows them, and gives the record of each.

    Raises:
        VerificationError: names what does not hold, in any of the processes.
    """
    clock = time.perf_counter()
    rows = _rows_of(ready)
    here = [
        documents_apart(ready),
        *gradients(ready, rows),
        stop_tokens(ready),
        save_and_load(ready, rows[0]),
        fast_path(ready),
        room(ready),
        exports(ready),
    ]
    proofs = _of_all_processes(here)
    _show(proofs, time.perf_counter() - clock)
    failed = [proof for proof in proofs if proof.holds is False]
    if failed:
        raise VerificationError(
            "\n".join(f"preflight: {proof.name}: {proof.words}; {proof.advice}" for proof in failed)
            + "\nNothing was trained. preflight: false trains regardless"
        )
    return [proof.record() for proof in proofs]


def _of_all_processes(here: list[Proof]) -> list[Proof]:
    """Those of the first process, but what fails anywhere."""
    everywhere: list[Proof] = gather_object(here)
    places = [everywhere[place :: len(here)] for place in range(len(here))]
    return [next((proof for proof in same if proof.holds is False), same[0]) for same in places]


def _show(proofs: Sequence[Proof], seconds: float) -> None:
    from rich.text import Text

    table = table_of("", "", "")
    table.show_header = False
    for proof in proofs:
        word, style = MARKS[proof.holds]
        table.add_row(Text(word, style), Text(proof.name), Text(proof.words))
    console().print(table)
    counts = Counter(proof.holds for proof in proofs)
    failed = f", {counts[False]} failed" if counts[False] else ""
    say("preflight", f"{counts[True]} proofs hold{failed} ({seconds:.1f} s)")


def _rows_of(ready: Ready) -> list[Example]:
    """Two short rows of the data, of different lengths: a sum over them is no plain mean."""
    examples = ready.job.train.examples
    first, second = examples[0], examples[min(1, len(examples) - 1)]
    longer = shortened(first, TOKENS)
    return [longer, shortened(second, max(2, 3 * min(TOKENS, len(second.input_ids)) // 4))]


# --- one file at a time -----------------------------------------------------------------------------------


def documents_apart(ready: Ready) -> Proof:
    """Examples that share a row do not move each other; measured when the batches were settled."""
    name, batching = "documents stay apart", ready.job.batching
    if batching.apart is None:
        asked = ready.job.config.packing and not batching.packing
        return Proof(name, f"each is padded in a row of its own{' (packing is off, see above)' if asked else ''}", None)
    return Proof(name, f"in one row they move each other's logits by {batching.apart}", not batching.apart.is_real)


def stop_tokens(ready: Ready) -> Proof:
    """Rows end with a token that is learned and at which generation stops. Rows that do not are only told: cutting
    and `allow` make them."""
    name, speech = "stop token", ready.job.speech
    examples = Rows(ready.job.train.examples)
    places = np.linspace(0, len(examples) - 1, min(len(examples), ROWS_LOOKED_AT)).astype(int)
    learned = (np.asarray(examples[int(place)].labels) for place in places)
    ends = Counter(int(last[-1]) for labels in learned if len(last := labels[labels != IGNORED]))
    stops = speech.tokenizer.convert_tokens_to_ids(speech.stop_tokens)
    stop_list = ready.trainer.model.get_base_model().generation_config.eos_token_id
    stop_list = [stop_list] if isinstance(stop_list, int) else list(stop_list or [])
    used = [token for token, _ in ends.most_common() if token in stops]
    words = ", ".join(str(speech.tokenizer.convert_ids_to_tokens(token)) for token in used) or "a stop token"
    count = sum(ends[token] for token in used)
    told = f"{count:,} of {len(places):,} rows learn to end with {words}"
    if missing := [token for token in used if token not in stop_list]:
        ids = ", ".join(map(str, missing))
        return Proof(
            name,
            f"{told}, but {ids} is not in generation_config.eos_token_id: {stop_list}",
            False,
            "the trained model would not stop there; set the model's generation_config.eos_token_id",
        )
    told += f"; eos_token_id is {', '.join(map(str, stop_list))}"
    return Proof(name, told, True if count == len(places) else None)


def fast_path(ready: Ready) -> Proof:
    """A step with the fast parts is the plain model's; measured when they were put in."""
    name, fast = "fast path equals plain path", ready.fast
    if fast is None:
        return Proof(name, "the fast parts are switched off (fast_kernels: false)", None)
    words = f"a step differs by {fast.distance} ({_rounding_in_words(_dtype_of(ready))})"
    return Proof(name, words, True) if fast.engaged else Proof(name, f"{words}: they were taken out", None)


def room(ready: Ready) -> Proof:
    """The disk has room for what the run writes, and for a merge beside it; where the latter is missing, it is told."""
    job, model = ready.job, ready.trainer.model
    trained, every = count_parameters(model)
    needed = job.output_bytes or 4 * trained
    merged = (stored_bytes(job.spec) if job.spec.name else None) or (every - trained) * model.dtype.itemsize
    free = free_bytes(ready.folder.path)
    words = f"{_gib(needed)} for adapter and checkpoints, {_gib(merged)} for a merged model, {_gib(free)} are free"
    if free < needed + merged:
        return Proof("room on disk", f"{words}: merge into a folder on another disk", None)
    return Proof("room on disk", words, True)


def exports(ready: Ready) -> Proof:
    """What the named targets would refuse was refused before the weights were read."""
    name, targets = "export", ready.job.config.export_to
    if not targets:
        return Proof(name, "no target is named (export_to)", None)
    return Proof(name, f"{', '.join(targets)}: nothing of this adapter and base is refused", True)


# --- gradients --------------------------------------------------------------------------------------------


def gradients(ready: Ready, rows: Sequence[Example]) -> list[Proof]:
    """Two proofs of the same passes: micro-batches add up; the gradient reaches what is trained and nothing else."""
    names, trainer = ("accumulation", "gradient"), ready.trainer
    why_not = None
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        why_not = "the weights are spread over the processes"
    elif "lomo" in str(trainer.args.optim).lower():
        why_not = f"{trainer.args.optim} steps inside the backward pass"
    elif not any(example.supervised_tokens for example in rows):
        why_not = "nothing is learned of the first rows"
    if why_not is not None:
        return [Proof(name, f"not tried: {why_not}", None) for name in names]
    with rehearsing(trainer):
        rehearsal = Rehearsal(trainer, Collator(ready.job.batching, trainer.processing_class.pad_token_id), rows)
        step = rehearsal.step()
        if _anywhere(not _is_finite(step.whole) or not _is_finite(step.parts)):
            words = "not judged: loss or gradients are no numbers; where that begins is looked for next"
            return [Proof(name, words, None) for name in names]
        adds_up = _accumulation(rehearsal, step, _dtype_of(ready))
        with trainer.accelerator.autocast():
            return [adds_up, _reach(trainer.model, step.whole.gradients, rows, ready.job.speech.new_token_ids)]


def _accumulation(rehearsal: Rehearsal, step: Step, dtype: torch.dtype) -> Proof:
    """One micro-batch of all rows gives the gradients that as many micro-batches of one give together."""
    name, advice = "accumulation", "gradient_accumulation_steps: 1 trains right; please report it"
    distance = step.distance
    if _anywhere(step.training and not distance.is_rounding(dtype)):  # it may draw numbers in a way that is not known
        step = rehearsal.step(training=False)
        distance = step.distance
    words = f"{len(rehearsal.rows)} micro-batches of one row and one of {len(rehearsal.rows)} differ by {distance}"
    if not _anywhere(not distance.is_rounding(dtype)):
        return Proof(name, f"{words} ({_rounding_in_words(dtype)})", True)
    noise = rehearsal.noise(step)
    allowed = Distance(*(max(NOISE_FACTOR * value, usual) for value, usual in zip(noise, ROUNDING[dtype], strict=True)))
    words += f" (rounding: {allowed.loss:.1g} and {allowed.gradients:.1g})"
    if allowed.gradients > TOO_NOISY:
        return Proof(name, f"{words}, which proves nothing", None)
    return Proof(name, words, all(far <= most for far, most in zip(distance, allowed, strict=True)), advice)


def _anywhere(here: bool) -> bool:
    """Whether it is so in any process: all of them go the same way, since steps count the tokens of all."""
    return any(gather_object([here]))


def _reach(model: Any, gradients: Mapping[str, Tensor], rows: Sequence[Example], new_token_ids: Sequence[int]) -> Proof:
    """Every adapter that the model computes with has a gradient at all that is trained of it, and nothing else has."""
    name, places = "gradient", {one.untyped_storage().data_ptr() for one in trained_tensors(model).values()}
    adapters: dict[str, bool] = {}  # {module: whether all that is trained of it was reached, and something is}
    strangers, trained, frozen = [], set(), 0
    reached = _not_zero(gradients)
    for parameter_name, parameter in model.named_parameters():
        if parameter.untyped_storage().data_ptr() not in places:
            strangers += [parameter_name] if parameter.requires_grad else []
            frozen += not parameter.requires_grad
            continue
        module = adapted_module(parameter_name)
        adapters.setdefault(module, True)
        if parameter.requires_grad:
            trained.add(module)
            adapters[module] &= parameter_name in reached
    missing = [module for module, is_reached in adapters.items() if not is_reached or module not in trained]
    idle = _idle(model, missing, rows, new_token_ids)
    lost = [module for module in missing if module not in idle]
    words = f"reaches {len(adapters) - len(missing):,} of {len(adapters):,} adapters"
    words += f", none of {frozen:,} frozen weights" if not strangers else ""
    for why in dict.fromkeys(idle.values()):
        words += f"; {why}: {_some([module for module in idle if idle[module] == why])}"
    problems = [f"does not reach {_some(lost)}"] * bool(lost) + [f"also reaches {_some(strangers)}"] * bool(strangers)
    if problems:
        advice = "what has none would stay untrained, and what is not in the adapter would be lost; leave such modules "
        return Proof(name, "; ".join([*problems, words]), False, f"{advice}out of lora_target_modules, or report it")
    return Proof(name, words, True)


def _not_zero(gradients: Mapping[str, Tensor]) -> set[str]:
    """Names of the gradients in which something stands."""
    names = list(gradients)
    if not names:
        return set()
    largest = torch.stack([gradients[name].abs().max().float().cpu() for name in names])
    return {name for name, value in zip(names, largest.tolist(), strict=True) if value > 0}


def _idle(model: Any, missing: Sequence[str], rows: Sequence[Example], new_token_ids: Sequence[int]) -> dict[str, str]:
    """{module without a gradient: why it rightly has none on these rows}.

    The plain model does not call it: an expert to which no token was sent, a layer that takes what another computed. Or
    it only looks up new tokens, and the rows hold none.
    """
    if not missing:
        return {}
    plain, called = twin(model), set()
    for name in missing:
        plain.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
    plain.eval()(**_inputs(plain, rows), use_cache=False)
    idle = {name: "not called by the model on the first rows" for name in missing if name not in called}
    if new_token_ids and not {token for row in rows for token in row.input_ids} & {*new_token_ids}:
        tables = [name for name in missing if hasattr(model.get_submodule(name), "token_adapter")]
        idle |= dict.fromkeys(tables, "no new token in the first rows")
    return idle


# --- the adapter's file -----------------------------------------------------------------------------------


def save_and_load(ready: Ready, row: Example) -> Proof:
    """The adapter, filled and saved as the run will save it, is loaded by PEFT beside it on the same base weights:
    every tensor and the logits are those of the model that is trained."""
    name, model = "save and load", ready.trainer.model
    if ready.job.config.start_changes_base:
        words = f"not tried: {ready.job.config.lora_init} is saved for the unchanged base, of which there is no copy"
        return Proof(name, words, None)
    if not is_main_process():
        return Proof(name, "the first process does it", None)
    scratch = ready.folder.path / SCRATCH
    try:
        with left_as_it_was(model), filled(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said already when the adapter was attached
            shutil.rmtree(scratch, ignore_errors=True)
            ready.start.save(model, scratch)
            theirs = put_adapter(_bare(model), scratch, len(ready.job.speech.tokenizer))
            with ready.trainer.accelerator.autocast():
                return _equal(name, twin(model), theirs, row)
    except ModelError as error:
        return Proof(name, str(error).replace(str(scratch), "what was saved"), False, _SAVE_ADVICE)
    except ValueError as error:
        return Proof(name, f"not tried: {error}", None)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _bare(model: Any) -> Any:
    """The base without its adapter; what is trained of itself, such as biases, is zero in it until it is loaded."""
    found = twin(model, with_adapter=False)
    for name, parameter in list(found.named_parameters()):
        if parameter.requires_grad:
            _put(found, name, torch.zeros_like(parameter))
    return found


def _put(model: Any, name: str, tensor: Tensor) -> None:
    """Another parameter in the place of one."""
    home, _, leaf = name.rpartition(".")
    vars(model.get_submodule(home))["_parameters"][leaf] = nn.Parameter(tensor, requires_grad=False)


_SAVE_ADVICE = "what is loaded later would not be what was trained; leave out what is named, or report it"


def _equal(name: str, ours: Any, theirs: Any, row: Example) -> Proof:
    """Tensor for tensor, in the dtype in which they are loaded, and then the logits of both."""
    loaded = dict(theirs.named_parameters())
    changed, count = [], 0
    for parameter_name, parameter in list(ours.named_parameters()):
        other = loaded.get(parameter_name)
        if other is parameter:  # of the base, which both have
            continue
        count += 1
        if other is None or not torch.allclose(parameter.to(other.dtype), other, rtol=0, atol=0, equal_nan=True):
            changed.append(parameter_name)
        elif other.dtype != parameter.dtype:
            _put(ours, parameter_name, parameter.to(other.dtype))
    if changed:
        return Proof(name, f"{len(changed):,} of {count:,} tensors changed: {_some(changed)}", False, _SAVE_ADVICE)
    inputs = _inputs(ours, [row])
    here, there = (model.eval()(**inputs, use_cache=False).logits for model in (ours, theirs))
    if not bool(here.isfinite().all()):
        return Proof(name, f"{count:,} tensors come back; the logits are no numbers, which is looked into next", None)
    furthest = float((here.float() - there.float()).abs().max())
    noise = 0.0
    if furthest > 0:  # some kernels of GPUs add in another order each time
        noise = NOISE_FACTOR * float((here.float() - ours(**inputs, use_cache=False).logits.float()).abs().max())
    words = f"{count:,} tensors come back; the logits of {here.shape[1]} tokens differ by {furthest:.2g}"
    words += f" (rounding: {noise:.1g})" if noise else ""
    return Proof(name, words, furthest <= noise, _SAVE_ADVICE)


# --- words and numbers ------------------------------------------------------------------------------------


def _inputs(model: Any, rows: Sequence[Example]) -> dict[str, Tensor]:
    batch = pad(rows, pad_token_id=0, device=model.device)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _dtype_of(ready: Ready) -> torch.dtype:
    """Of the arithmetic."""
    dtype: torch.dtype = getattr(torch, ready.job.spec.dtype)
    return dtype


def _rounding_in_words(dtype: torch.dtype) -> str:
    of_loss, of_gradients = ROUNDING[dtype]
    return f"rounding: {of_loss:g} and {of_gradients:g}"


def _is_finite(measured: Measured) -> bool:
    sums = [gradient.sum().float().cpu() for gradient in measured.gradients.values()]
    return math.isfinite(measured.loss) and (not sums or bool(torch.stack(sums).isfinite().all()))


def _some(names: Sequence[str]) -> str:
    """The first names, without what stands before all of them."""
    short = [name.removeprefix("base_model.model.") for name in names]
    return ", ".join(short[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
