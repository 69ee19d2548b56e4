"""A micro-batch on which a training failed → files in `failure/`, and from them the same arithmetic once more.

failure/
  failure.json          what went wrong, at which step, on which rows; the first module that gave NaN or Inf
  batch.safetensors     the tensors of the micro-batch: input_ids, labels, attention_mask or position_ids, …
  random.safetensors    the random generators before it was run
  adapter/              the adapter as it was: no update was made of the failing step
  run.yaml              every setting of the run
"""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_sft.chat.labels import Example
from lora_sft.config import RunConfig
from lora_sft.errors import ModelError, OutputError
from lora_sft.settings import read_file, resolve, to_yaml
from lora_sft.training.loss import forward_loss
from lora_sft.training.modules import Look, first_bad, look_behind_modules
from lora_sft.training.watch import Fault, MicroBatch, set_random_state

FAILURE = "failure"
"""Folder of a failed step, in the output folder of its run."""

SETTINGS, TOLD = "run.yaml", "failure.json"


@dataclass(frozen=True)
class Failure:
    """A step that failed, as `failure.json` tells it.

    Attributes:
        kind: weights, loss, gradient or diverged.
        problem: a sentence for a person.
        after_step: the last step that was taken; `adapter/` holds the weights after it.
        step, micro_batch: which micro-batch it is; the steps are counted from 1, the micro-batches in each from 0.
        process: which of several processes ran it.
        token_count: by what its summed loss is divided.
        loss: of the micro-batch, when it was run again at once; of a mean over its step, its share.
        rows: [{"source": "chats.jsonl:12", "example", "tokens"}], in the order of the micro-batch.
        first: the first look at a NaN or Inf, with the source of its row; None: there was none when it was run again.
        weights: names of weights that hold NaN or Inf.
        autocast: dtype of the arithmetic if it is not that of the weights.
        scale: of the loss in the backward pass; not 1 in float16.
        vocabulary_size: rows of the embeddings that the tokenizer needs.
        device: where it ran.
        other: what of the micro-batch is not a tensor.
        was_run_again: whether there was memory for that.
    """

    kind: str
    problem: str
    after_step: int
    step: int
    micro_batch: int
    process: int
    token_count: int | None
    loss: float
    rows: list[dict[str, Any]]
    first: dict[str, Any] | None
    weights: list[str]
    autocast: str | None
    scale: float
    vocabulary_size: int
    device: str
    other: dict[str, Any]
    was_run_again: bool = True

    def in_words(self) -> str:
        """Where it is: rows and module."""
        sources = [row["source"] or f"example {row['example']}" for row in self.rows]
        some = ", ".join(sources[:4]) + (f" and {len(sources) - 4} more" if len(sources) > 4 else "")
        if not self.was_run_again:
            seen = "; there was no memory to run it again as a whole"
        elif self.first is None:
            seen = "" if self.kind in ("weights", "diverged") else "; run again, it gave none: look at the hardware too"
        else:
            what = {"forward": "the output", "backward": "the gradient of the output", "gradient": "the gradient"}
            at = f", at token {self.first['token']} of {self.first['source']}" if self.first.get("source") else ""
            seen = f"; the first NaN or Inf is in {what[self.first['direction']]} of {self.first['module']}{at}"
        return f"micro-batch {self.micro_batch + 1} of step {self.step} ({some}){seen}"


def describe(
    fault: Fault,
    batch: MicroBatch,
    loss: float,
    looks: Sequence[Look],
    examples: Mapping[int, Example],
    after_step: int,
    process: int,
    autocast: str | None,
    scale: float,
    vocabulary_size: int,
    device: str,
) -> Failure:
    """All that is known of a failed micro-batch.

    Args:
        looks: at every module, when it was run again.
        examples: {index in the training data: example}, in the order of the micro-batch.
    """
    bad = first_bad(list(looks))
    return Failure(
        kind=fault.kind,
        problem=fault.words,
        after_step=after_step,
        step=batch.step + 1,
        micro_batch=batch.number,
        process=process,
        token_count=None if batch.token_count is None else int(batch.token_count),
        loss=loss,
        rows=[
            {"source": example.source, "example": index, "tokens": len(example.input_ids)}
            for index, example in examples.items()
        ],
        first=None if bad is None else as_json(bad, batch.inputs, list(examples.values())),
        weights=list(fault.weights),
        autocast=autocast,
        scale=scale,
        vocabulary_size=vocabulary_size,
        device=device,
        other={name: value for name, value in batch.inputs.items() if not isinstance(value, Tensor)},
        was_run_again=bool(looks),
    )


def as_json(look: Look, inputs: Mapping[str, Any], examples: Sequence[Example]) -> dict[str, Any]:
    """A look with the source of the row that it fell on, and the token counted from the start of that row."""
    found = asdict(look) | {"source": None}
    if look.row is None or look.token is None:
        return found
    for row, start, example in _places(inputs["input_ids"], examples):
        if row == look.row and start <= look.token < start + len(example.input_ids):
            return found | {"source": example.source, "token": look.token - start}
    return found


def _places(input_ids: Tensor, examples: Sequence[Example]) -> list[tuple[int, int, Example]]:
    """Row and first token of every example of a micro-batch, packed or padded; rows are filled one after the other."""
    places, waiting = [], list(examples)
    for row, tokens in enumerate(input_ids.tolist()):
        start = 0
        while waiting and tokens[start : start + len(waiting[0].input_ids)] == list(waiting[0].input_ids):
            places.append((row, start, waiting[0]))
            start += len(waiting.pop(0).input_ids)
    return places


def write_failure(output_dir: Path, failure: Failure, batch: MicroBatch, model: Any, config: RunConfig) -> Path:
    """Writes `failure/`, in place of an older one; it is there only once it is whole.

    Raises:
        OSError: no room, no right to write, or somebody else's files in a folder of that name.
    """
    staged, folder = output_dir / f".{FAILURE}.part", output_dir / FAILURE
    if folder.exists() and not (folder / TOLD).is_file():
        raise FileExistsError("it holds something else")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    tensors = {name: value for name, value in batch.inputs.items() if isinstance(value, Tensor)}
    # Two names of one tensor would be refused: each is written as a copy.
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()},
        staged / "batch.safetensors",
    )
    save_file(dict(batch.random), staged / "random.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*changes the base weights of the model")
        model.save_pretrained(staged / "adapter", save_embedding_layers=False)
    (staged / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    if (output_dir / SETTINGS).is_file():
        shutil.copyfile(output_dir / SETTINGS, staged / SETTINGS)
    else:
        (staged / SETTINGS).write_text(to_yaml(config), encoding="utf-8")
    (staged / TOLD).write_text(json.dumps(asdict(failure), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    staged.replace(folder)
    return folder


def read_failure(output_dir: Path) -> tuple[Path, Failure]:
    """The folder of a failed step, and what it tells.

    Raises:
        OutputError: there is none.
    """
    folder = next((one for one in (output_dir / FAILURE, output_dir) if (one / TOLD).is_file()), None)
    if folder is None:
        raise OutputError(
            f"{output_dir}: no failed step here ({FAILURE}/{TOLD}); a run that meets NaN, Inf or a loss that "
            "explodes writes one"
        )
    try:
        return folder, Failure(**json.loads((folder / TOLD).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise OutputError(f"{folder / TOLD}: cannot be read: {error}") from None


def replay(
    output_dir: str | Path, model: str | None = None, device: str = "auto", trust_remote_code: bool = False
) -> dict[str, Any]:
    """Runs the micro-batch of a failed step again, with the adapter and the random numbers of then.

    Args:
        output_dir: of the run.
        model: where the base is now; None: where it was.

    Returns:
        {"output_dir", "kind", "problem", "after_step", "step", "micro_batch", "rows", "loss" of then and "loss_now",
        "reproduced", "first": the first module that gives NaN or Inf, "weights" that hold one, "modules": all of them
        in the order of the arithmetic}.

    Raises:
        OutputError: no failed step there.
        ModelError: the base is not there, or is another.
    """
    folder, failure = read_failure(Path(output_dir).expanduser())
    adapted = _load(folder, failure, model, device, trust_remote_code)
    tensors = load_file(folder / "batch.safetensors")
    inputs = {name: value.to(adapted.device) for name, value in tensors.items() if name != "tokens"} | failure.other
    set_random_state(load_file(folder / "random.safetensors"), adapted.device)

    def run() -> Tensor:
        dtype = getattr(torch, failure.autocast or "bfloat16")
        with torch.autocast(adapted.device.type, dtype, enabled=failure.autocast is not None):
            loss, _ = forward_loss(adapted, inputs, failure.token_count)
        return loss.value * failure.scale

    loss, looks = look_behind_modules(adapted, run)
    bad = first_bad(looks)
    is_same_loss = abs(loss - failure.loss * failure.scale) <= 1e-3 * max(1.0, abs(failure.loss * failure.scale))
    return {
        "output_dir": str(output_dir),
        **{
            name: getattr(failure, name)
            for name in ("kind", "problem", "after_step", "step", "micro_batch", "rows", "loss")
        },
        "loss_now": loss / failure.scale,
        "reproduced": bad is not None if failure.kind != "diverged" else is_same_loss,
        "first": None if bad is None else asdict(bad) | {"source": _source_of(bad, failure, inputs)},
        "weights": failure.weights,
        "modules": [asdict(look) for look in looks],
    }


def _source_of(look: Look, failure: Failure, inputs: Mapping[str, Tensor]) -> str | None:
    """The row that a look fell on: as it was told then, or by its number where each row is one example."""
    if failure.first is not None and (failure.first["module"], failure.first["direction"]) == (
        look.module,
        look.direction,
    ):
        return failure.first["source"]  # type: ignore[no-any-return]
    is_packed = "position_ids" in inputs
    return None if look.row is None or is_packed else failure.rows[look.row]["source"]


def _load(folder: Path, failure: Failure, model: str | None, device: str, trust_remote_code: bool) -> Any:
    """The base as it was trained, with the adapter of the failing step, in training mode."""
    from peft import LoraConfig, set_peft_model_state_dict
    from transformers import set_seed

    from lora_sft.model.adapter import attach
    from lora_sft.model.base import choose_base, grow_vocabulary, load_base

    config = resolve(
        read_file(folder / SETTINGS),
        {"device": device, "trust_remote_code": trust_remote_code, **({"model_name_or_path": model} if model else {})},
    )
    if not config.model_name_or_path:
        raise ModelError(f"{folder}: the model was given loaded in Python; name its folder or hub name with --model")
    base = load_base(choose_base(config))
    set_seed(config.seed)
    grow_vocabulary(base, failure.vocabulary_size)
    settings = LoraConfig.from_pretrained(folder / "adapter")
    if not config.start_changes_base:
        settings.init_lora_weights = True  # what the start gave is in the saved weights
    settings.inference_mode = False
    adapted = attach(base, settings, config.seed)
    try:
        set_peft_model_state_dict(adapted, load_file(folder / "adapter" / "adapter_model.safetensors"))
    except RuntimeError as error:
        raise ModelError(f"{folder}: the adapter does not fit its base: {str(error).splitlines()[0]}") from None
    return adapted.train()
