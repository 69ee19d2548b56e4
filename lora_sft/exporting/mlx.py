"""An adapter and its base → what mlx-lm loads: a whole model, or an adapters folder for the base.

mlx-lm reads `config.json` as it was before transformers 5, and takes defaults of its own where a setting is missing.
So the base's own file is kept, and what transformers makes of it is added in the form that mlx-lm looks for.
"""

import importlib.util
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_sft.console import say
from lora_sft.errors import ModelError, VerificationError
from lora_sft.exporting.normal_form import (
    SETTINGS,
    adapts_embeddings,
    copy_accompanying,
    read_updates,
    write_normal_form,
)
from lora_sft.exporting.normal_form import refusals as normal_form_refusals
from lora_sft.exporting.target import Facts, Order, Target
from lora_sft.merging.base_files import base_folder, weight_tensors
from lora_sft.merging.fidelity import compare, logits_of, probes_of
from lora_sft.merging.file_check import check_files
from lora_sft.merging.verify import Verified, free_bytes
from lora_sft.model.base import BaseSpec, load_base, read_config
from lora_sft.model.loading import load_adapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = ("auto", "bfloat16", "float16", "float32")
TOLERANCE = 1e-4
"""Largest difference of a logit in float32, relative to the largest logit (or to one, if that is more)."""

SAME_NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
"""Model types whose modules bear the same names in mlx-lm as in transformers; each of them is in the tests."""

NOT_INSTALLED = "not run: mlx-lm is not installed here; pip install 'mlx-lm[cpu]' (on a Mac: mlx-lm) to have it checked"
USE_WHOLE = "export the whole model instead: target mlx"


def config_for_mlx(stored: Mapping[str, Any], config: "PretrainedConfig") -> dict[str, Any]:
    """A base's `config.json` with what mlx-lm would miss in it.

    Args:
        stored: the file's contents.
        config: what transformers makes of them.

    Raises:
        ModelError: mlx-lm has no way to say what this model does.
    """
    if isinstance(inner := stored.get("text_config"), dict):
        return {**stored, "text_config": config_for_mlx(inner, config.get_text_config())}
    known = {name: value for name, value in config.to_dict().items() if value is not None and name[0] != "_"}
    known.pop("transformers_version", None)
    config_json = {**stored, **{name: value for name, value in known.items() if stored.get(name) is None}}
    for name, value in {**_rope(known.get("rope_parameters") or {}), **_others(known)}.items():
        if config_json.get(name) is None:
            config_json[name] = value
    return config_json


def _rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5 as the settings that were there before."""
    whole = parameters.get("full_attention", parameters)  # Gemma 3 has one set for each kind of layer
    found = {name: whole[name] for name in ("rope_theta", "partial_rotary_factor") if name in whole}
    if "sliding_attention" in parameters:
        found["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    if (kind := whole.get("rope_type", "default")) != "default":
        found["rope_scaling"] = {**{name: whole[name] for name in whole if name not in found}, "type": kind}
    return found


def _others(known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that bear another name in mlx-lm."""
    found = {"torch_dtype": known.get("dtype"), "n_ctx": known.get("n_positions")}
    kinds = known.get("layer_types")
    if known["model_type"] == "gemma3_text" and kinds:
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
        if kinds != ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(len(kinds))]:
            raise ModelError(f"mlx-lm knows full attention in every n-th layer of a Gemma 3 only, not {kinds}")
        found["sliding_window_pattern"] = every
    return {name: value for name, value in found.items() if value is not None}


def refusals(facts: Facts, options: Mapping[str, Any]) -> list[str]:
    """Why this model cannot be served whole by mlx-lm."""
    problems = _unknown_to_mlx(facts.config)
    if options.get("dtype", "auto") not in DTYPES:
        problems.append(f"dtype {options['dtype']!r} is not one of {', '.join(DTYPES)}")
    return problems


def adapter_refusals(facts: Facts, options: Mapping[str, Any]) -> list[str]:
    """Why this adapter cannot be served by mlx-lm on its base."""
    problems = normal_form_refusals(facts, options) + _unknown_to_mlx(facts.config)
    text = facts.config.get_text_config()
    if not is_installed() and text.model_type not in SAME_NAMES:
        problems.append(
            f"whether the modules of a {text.model_type} model have the same names in mlx-lm can only be seen where "
            f"it is installed; install mlx-lm, or {USE_WHOLE}"
        )
    if text.tie_word_embeddings and (names := adapts_embeddings(facts)):
        problems.append(
            f"{', '.join(names)}: embeddings and head of this base are one matrix, and mlx-lm would put the update "
            f"into both; {USE_WHOLE}"
        )
    return problems


def is_installed() -> bool:
    """Whether mlx-lm can be run here."""
    return all(importlib.util.find_spec(name) for name in ("mlx", "mlx_lm"))


def readiness() -> dict[str, str]:
    """{what a target of MLX needs: what is wrong with it, or ""}; without it the export is made, but not run."""
    return {"mlx-lm": "" if is_installed() else NOT_INSTALLED}


def why_not_run(weights: Path) -> str | None:
    """Why mlx-lm cannot be run on these weights here; None if it can."""
    if not is_installed():
        return NOT_INSTALLED
    # In float32, once; the copies that loading makes for a moment are of single tensors.
    needed = sum(4 * stored.rows * stored.columns for stored in weight_tensors(weights).values())
    free = free_bytes()
    if needed * 1.2 > free:
        return f"not run: it takes {needed * 1.2 / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free"
    return None


def _unknown_to_mlx(config: "PretrainedConfig") -> list[str]:
    if not is_installed():
        return []
    from mlx_lm.utils import MODEL_REMAPPING

    name = MODEL_REMAPPING.get(config.model_type, config.model_type)
    if importlib.util.find_spec(f"mlx_lm.models.{name}"):
        return []
    return [f"the installed mlx-lm does not know {config.model_type} models; update it, or choose another target"]


def _write_whole(order: Order) -> dict[str, Any]:
    from lora_sft.merging.merged import open_merged
    from lora_sft.merging.write import write_model

    asked = order.options.get("dtype", "auto")
    dtype = order.spec.dtype if asked == "auto" else asked
    merged = open_merged(order.adapter, order.spec, order.onto)
    write_model(merged, order.folder, dtype)
    weights = Verified(None, check_files(merged, order.folder), dtype)
    weights.refuse()
    config = read_config(BaseSpec(str(order.folder), trust_remote_code=order.spec.trust_remote_code))
    file = order.folder / "config.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config_for_mlx(stored, config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {
        "dtype": dtype,
        "verified": weights.summary() | _verify_whole(order, dtype),
        "serve": f"mlx_lm.server --model {shlex.quote(str(order.output))}{_template_variables(order.adapter)}",
        "notes": _differences(config, order.spec.dtype),
    }


def _write_adapter(order: Order) -> dict[str, Any]:
    from safetensors.torch import save_file

    config, base = read_config(order.spec), base_folder(order.spec)
    _check_base(order, base)
    with TemporaryDirectory(dir=order.folder) as normal:
        form = write_normal_form(order.adapter, Path(normal), config)
        updates = read_updates(Path(normal), json.loads((Path(normal) / SETTINGS).read_text(encoding="utf-8")))
    tensors = {}
    for module, update in updates.items():
        tensors[f"{module}.lora_a"] = update.a.T.contiguous()
        tensors[f"{module}.lora_b"] = update.b.T.contiguous()
    save_file(tensors, order.folder / "adapters.safetensors", {"format": "mlx"})
    settings = {
        "fine_tune_type": "lora",
        "model": order.spec.name,
        "num_layers": config.get_text_config().num_hidden_layers,
        # The names are whole, so that just these modules are adapted, in whichever layer they are.
        "lora_parameters": {"rank": form.rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(updates)},
    }
    (order.folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    copy_accompanying(order.adapter, order.folder)
    return {
        "verified": form.verified | _verify_adapter(order, base),
        "serve": _serve_adapter(order),
        "rank": form.rank,
        "notes": [*form.notes, *_differences(config, order.spec.dtype), *_other_base(order.spec)],
    }


def _check_base(order: Order, base: Path) -> None:
    """What mlx-lm takes from the base's folder must be what was trained.

    Raises:
        ModelError: it would read other settings, or stop at other tokens.
    """
    stored = json.loads((base / "config.json").read_text(encoding="utf-8"))
    inner = stored.get("text_config", stored)
    if not is_installed() and "rope_parameters" in inner and "rope_theta" not in inner:
        raise ModelError(
            f"{base}/config.json: has rope_parameters, which not all of mlx-lm reads; install mlx-lm to see whether it "
            f"does for this model, or {USE_WHOLE}"
        )
    if missing := sorted(_stop_ids(order.adapter) - (_stop_ids(base) or _ids(stored.get("eos_token_id")))):
        raise ModelError(
            f"with an adapter mlx-lm stops at the base's own stop tokens only; token {missing[0]} was trained to end "
            f"a reply and is none of them; {USE_WHOLE}"
        )


def _stop_ids(folder: Path) -> set[int]:
    file = folder / "generation_config.json"
    return _ids(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")) if file.is_file() else set()


def _ids(value: int | Sequence[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def _serve_adapter(order: Order) -> str:
    name, folder = shlex.quote(order.spec.name), shlex.quote(str(order.output))
    if order.spec.revision and not Path(order.spec.name).is_dir():
        name = f'"$(hf download --quiet {name} --revision {order.spec.revision})"'
    template = order.folder / "chat_template.jinja"
    told = f' --chat-template "$(cat {folder}/{template.name})"' if template.is_file() else ""
    return f"mlx_lm.server --model {name} --adapter-path {folder}{told}{_template_variables(order.adapter)}"


def _template_variables(adapter: Path) -> str:
    """The variables that the chat template was given in training, as the server is told of them."""
    file = adapter / "manifest.json"
    variables = json.loads(file.read_text(encoding="utf-8")).get("chat_template_kwargs") if file.is_file() else None
    return f" --chat-template-args {shlex.quote(json.dumps(variables))}" if variables else ""


def _other_base(spec: BaseSpec) -> list[str]:
    if spec.quantization is None:
        return []
    return [
        f"trained on a base in {spec.quantization}, served on the full-precision one: near to what was trained, but "
        "not equal; the target mlx takes the base as trained into the weights"
    ]


def _differences(config: "PretrainedConfig", trained_dtype: str) -> list[str]:
    """What mlx-lm computes otherwise, and the probes do not show."""
    text, found = config.get_text_config(), []
    window = getattr(text, "sliding_window", None)
    if text.model_type in ("mistral", "phi3", "qwen2", "qwen3") and window:
        found.append(f"mlx-lm attends to the whole text, this model to {window} tokens: longer texts can differ")
    if _rounds_scale(config) and trained_dtype != "bfloat16":
        found.append(
            f"mlx-lm rounds the factor of a Gemma 3's embeddings to bfloat16, which training in {trained_dtype} did "
            "not: logits differ in the third digit; the comparison leaves this out"
        )
    return found


def _verify_whole(order: Order, dtype: str) -> dict[str, Any]:
    """The folder in mlx-lm against transformers on the same folder, and against the adapter on its base.

    Raises:
        VerificationError: one of them differs.
    """
    if reason := why_not_run(order.folder):
        say("mlx", reason)
        return {"mlx": reason}
    on_cpu = replace(
        order.spec, device="cpu", quantization=order.spec.quantization if order.onto == "trained" else None
    )
    if on_cpu.quantization is None:
        on_cpu = replace(on_cpu, dtype="float32")
    probes, adapter, base = _adapter_logits(order.adapter, on_cpu)
    written = BaseSpec(str(order.folder), trust_remote_code=order.spec.trust_remote_code)
    found = _mlx_logits(order.folder, probes, stop_ids=_stop_ids(order.folder))
    difference = _refuse_other_logits(found, logits_of(_scaled_as_in_mlx(load_base(written)), probes))
    fidelity = compare(found, adapter, base)
    if on_cpu.quantization is None and dtype == "float32":
        _refuse_other_logits(found, adapter)
    if not fidelity.holds(max(dtype, order.spec.dtype, key=("float32", "float16", "bfloat16").index)):
        raise VerificationError(f"the model in mlx-lm is not the adapter: {fidelity}")
    return {**asdict(fidelity), "mlx": {"max_abs_logit_diff_from_transformers": difference}}


def _verify_adapter(order: Order, base: Path) -> dict[str, Any]:
    """The adapters folder in mlx-lm against PEFT, both on the full-precision base.

    Raises:
        VerificationError: they differ.
    """
    if reason := why_not_run(base):
        say("mlx", reason)
        return {"mlx": reason}
    on_cpu = replace(order.spec, device="cpu", quantization=None, dtype="float32")
    probes, adapter, bare = _adapter_logits(order.adapter, on_cpu)
    found = _mlx_logits(base, probes, order.folder)
    difference = _refuse_other_logits(found, adapter)
    return {**asdict(compare(found, adapter, bare)), "mlx": {"max_abs_logit_diff_from_peft": difference}}


def _refuse_other_logits(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of a logit.

    Raises:
        VerificationError: it is beyond the tolerance.
    """
    new, old = torch.cat(list(found)), torch.cat(list(wanted))
    difference, size = (new - old).abs().max().item(), max(old.abs().max().item(), 1.0)
    if not difference <= TOLERANCE * size:
        raise VerificationError(
            f"mlx-lm computes other logits: they differ by up to {difference:.1e}, where the largest is {size:.1f} and "
            f"{TOLERANCE:.0e} of it is allowed; it does not read this model as transformers does"
        )
    return float(difference)


def _adapter_logits(adapter: Path, spec: BaseSpec) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Probes as token ids (1, length), and the logits of the adapter and of its bare base on them."""
    loaded = load_adapter(adapter, spec)
    model, probes = _scaled_as_in_mlx(loaded.model), probes_of(loaded.tokenizer)
    logits = logits_of(model, probes)
    with model.disable_adapter():
        return probes, logits, logits_of(model, probes)


def _scaled_as_in_mlx(model: Any) -> Any:
    """The model with Gemma 3's factor of the embeddings, √hidden_size, as mlx-lm has it in every dtype.

    It is rounded to bfloat16 there, as it is in transformers when the model runs in bfloat16.
    """
    for module in model.modules():
        if isinstance(scale := getattr(module, "embed_scale", None), Tensor) and _rounds_scale(model.config):
            module.embed_scale = scale.to(torch.bfloat16).to(scale.dtype)
    return model.eval()


def _rounds_scale(config: "PretrainedConfig") -> bool:
    return bool(config.get_text_config().model_type == "gemma3_text")


def _mlx_logits(
    model: Path, probes: Sequence[Tensor], adapter: Path | None = None, stop_ids: set[int] | None = None
) -> list[Tensor]:
    """Logits of each probe as mlx-lm computes them in float32 on the CPU, (length, vocabulary).

    Raises:
        VerificationError: mlx-lm does not load it, or would not stop where it should.
    """
    import mlx.core as mx
    import numpy
    from mlx_lm import load

    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        loaded, tokenizer = load(str(model), adapter_path=str(adapter) if adapter else None)[:2]
        if missing := (stop_ids or set()) - set(tokenizer.eos_token_ids):
            raise VerificationError(f"mlx-lm does not stop at token {min(missing)}, which ends a reply")
        loaded.set_dtype(mx.float32)
        return [
            torch.from_numpy(numpy.array(loaded(mx.array(probe.tolist()))[0].astype(mx.float32))) for probe in probes
        ]
    except VerificationError:
        raise
    except Exception as error:  # whatever a reader of files may raise
        raise VerificationError(f"mlx-lm does not load it: {error}") from error
    finally:
        mx.set_default_device(before)


MLX = Target(
    name="mlx",
    help="A whole merged model that mlx-lm loads (Apple silicon).",
    refusals=refusals,
    write=_write_whole,
    options={"dtype": f"Of the weights: {', '.join(DTYPES)}; auto takes that of the training."},
    needs=readiness,
)
MLX_ADAPTER = Target(
    name="mlx-adapter",
    help="An adapters folder that mlx-lm loads on the base.",
    refusals=adapter_refusals,
    write=_write_adapter,
    makes_whole_model=False,
    needs=readiness,
)
