"""An adapter folder → a whole model in plain transformers form, compared with the adapter before it is called done.

The update is added in float32 to the base as it was in training: of a quantized base, to what the quantized weights
stand for. The result is written beside its final place, and gets its name only when it is whole and holds.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sft.console import console, say, table_of
from lora_sft.errors import ModelError, SettingError
from lora_sft.merging.adapter import WEIGHTS
from lora_sft.merging.base_files import base_folder, weight_tensors
from lora_sft.merging.combine import Blend
from lora_sft.merging.fidelity import Fidelity
from lora_sft.merging.merged import MergedModel, open_merged
from lora_sft.merging.staging import check_room, refuse_used, staged
from lora_sft.merging.verify import Reference, Verified, choose_way, refer, verify
from lora_sft.merging.write import write_model, written_bytes
from lora_sft.model.base import BaseSpec, load_base, read_config, skeleton
from lora_sft.model.device import peak_bytes
from lora_sft.model.fingerprint import hash_of_file
from lora_sft.model.foreign import read_adapter_config, refuse_odd_weights, refuse_slow_patterns, wrong_parts
from lora_sft.model.loading import manifest_of, trained_base
from lora_sft.publishing.card import merged_card
from lora_sft.publishing.public import MERGE_RECORD, read_metrics, read_run

if TYPE_CHECKING:
    from lora_sft.merging.losses import Losses

DTYPES = ("auto", "bfloat16", "float16", "float32")
BASES = ("trained", "original", "auto")
FOUR_BITS = ("nf4", "fp4")


@dataclass(frozen=True)
class Wishes:
    """How a merge is wanted; as the arguments of `merge`."""

    dtype: str = "auto"
    base: str = "trained"
    quantize: str | None = None
    verify: str = "auto"

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("dtype", self.dtype, DTYPES),
            ("base", self.base, BASES),
            ("quantize", self.quantize, (None, *FOUR_BITS)),
        ):
            if value not in accepted:
                raise SettingError(f"{name} {value!r} is not one of {', '.join(str(one) for one in accepted if one)}")


def merge(
    adapter: str | Path | Sequence[str | Path],
    output: str | Path,
    dtype: str = "auto",
    base: str = "trained",
    quantize: str | None = None,
    weights: Sequence[float] | None = None,
    combination: str = "linear",
    density: float = 0.5,
    verify: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    eval_dataset: Any = None,
    force: bool = False,
) -> dict[str, Any]:
    """Merges an adapter, or several, into their base. Memory stays flat: rows are read, summed and written.

    Args:
        adapter: the adapter folder; several are added up.
        output: the folder of the merged model; must not exist yet, or be empty.
        dtype: of the written weights: bfloat16, float16 or float32; auto takes that of the training.
        base: trained (the weights that training saw: of a quantized base, dequantized), original (as published), or
            auto, which makes both, shows how they compare, and keeps the better one.
        quantize: nf4 or fp4 quantizes the finished model, and says what that loses.
        weights: what the update of each adapter is multiplied with.
        combination: linear (the exact sum), ties, dare_linear or dare_ties.
        density: share of each update that ties and dare keep.
        verify: logits (both models are loaded, one after the other), tensors (each tensor against base and adapter),
            no, or auto: logits where memory allows.
        device: where the adapter runs on its base to be compared with; the merged model is loaded on the CPU.
        trust_remote_code: run Python code that comes with the base.
        eval_dataset: conversations for `base: auto` to go by, given like that of `finetune`, and read as the run of the
            (first) adapter read its own; None takes that run's own, if it had one.
        force: merge although an adapter or the base is not as the run that made the adapter left it.

    Returns:
        {"output_dir", "base", "onto", "dtype", "verified", "peak_rss_bytes", "seconds"}, and "losses" ({base: nats a
        token}) if they were measured.

    Raises:
        ModelError: no adapter there, it cannot be merged, its base cannot be had, or either was changed.
        OutputError: the output folder holds something, or the disk has no room.
        VerificationError: the merged model differs from the adapter; it is kept under a name that says so.
    """
    clock = time.perf_counter()
    wishes = Wishes(dtype, base, quantize, verify)
    folders = [Path(one) for one in ([adapter] if isinstance(adapter, (str, Path)) else adapter)]
    output = Path(output).expanduser().absolute()
    if eval_dataset is not None and base != "auto":
        raise SettingError(f"eval_dataset is for base: auto, to choose a base by its loss; here base is {base}")
    blend = Blend(tuple(weights or (1.0,) * len(folders)), combination, density)
    refuse_used(output)
    spec = _common_base(folders, device, trust_remote_code)
    base_folder(spec)
    for one in folders:
        look_at_parts(one, spec, force)
    dtype = spec.dtype if dtype == "auto" else dtype
    onto = _choose_bases(wishes.base, spec)
    merged = [open_merged(folders, spec, one, blend) for one in onto]
    needed = len(merged) * written_bytes(merged[0], dtype)
    check_room(output, needed)
    with staged(output, needed) as folder:
        if len(merged) == 1:
            found = _merge_onto(merged[0], folder, dtype, wishes, device)
        else:
            from lora_sft.merging.losses import losses_on  # brings the reading of data with it

            losses = losses_on(eval_dataset, folders[0], device, trust_remote_code)
            found = _better_of(merged, folder, dtype, wishes, device, losses)
        if wishes.quantize:
            found = _quantize(folder, found, wishes.quantize, spec)
        _write_record(folder, output.name, folders, blend, spec, found, dtype)
    return {
        "output_dir": str(output),
        "base": spec.name,
        "onto": found.onto,
        "dtype": found.quantized or dtype,
        "verified": found.summary(),
        "peak_rss_bytes": peak_bytes("cpu"),
        "seconds": round(time.perf_counter() - clock, 1),
    } | ({"losses": found.losses} if found.losses else {})


@dataclass(frozen=True)
class _Done:
    """A merge that was written and compared.

    Attributes:
        reference: the adapter on its base, if it was loaded.
        changed: by `original`: the result against the adapter on the base as trained.
        quantized: 4-bit kind; `lost`: its result against the adapter.
        losses: {base: nats a token}, where two were compared by them.
    """

    onto: str
    verified: Verified
    reference: Reference | None = None
    changed: Fidelity | None = None
    quantized: str | None = None
    lost: Fidelity | None = None
    losses: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        found = self.verified.summary()
        for name, fidelity in (("against_trained_base", self.changed), ("after_quantizing", self.lost)):
            if fidelity is not None:
                found[name] = asdict(fidelity) | {"share_lost": fidelity.share_lost}
        return found


def _common_base(folders: Sequence[Path], device: str, trust_remote_code: bool) -> BaseSpec:
    """How the base of the adapters was loaded in training; they must have the same one."""
    specs = [trained_base(folder, device, trust_remote_code, as_recorded=True) for folder in folders]
    if "base" not in manifest_of(folders[0]):  # trained elsewhere, in we do not know which dtype
        specs = [replace(spec, dtype=_published_dtype(spec)) for spec in specs]
    for folder, spec in zip(folders[1:], specs[1:], strict=True):
        if (spec.name, spec.revision) != (specs[0].name, specs[0].revision):
            raise ModelError(f"{folder}: was trained on {spec.name}, {folders[0]} on {specs[0].name}; they have no sum")
        if spec.quantization != specs[0].quantization:
            raise ModelError(
                f"{folder}: was trained on a base in {spec.quantization or spec.dtype}, {folders[0]} on one in "
                f"{specs[0].quantization or specs[0].dtype}; merge with base: original after a look at what it changes"
            )
    return specs[0]


def look_at_parts(folder: Path, spec: BaseSpec, force: bool) -> None:
    """Raises ModelError if an adapter holds NaN, or it or its base is not as the run left it; `force` only says so.

    The base is compared as far as its files are here.
    """
    refuse_odd_weights(folder)
    refuse_slow_patterns(read_adapter_config(folder), _names_in(spec), str(folder / "adapter_config.json"))
    wrong = wrong_parts(folder, manifest_of(folder), spec)
    if wrong and not force:
        raise ModelError.of([f"{words}; if you know better, use force=True (--force)" for words in wrong])
    for words in wrong:
        say("warning", words)


def _names_in(spec: BaseSpec) -> Iterator[str]:
    """The names of the base's modules and parameters; the model is built without weights when they are asked for."""
    shape = skeleton(read_config(spec), spec)
    yield from (name for name, _ in (*shape.named_modules(), *shape.named_parameters()))


def _published_dtype(spec: BaseSpec) -> str:
    """The dtype of most of the base's numbers, if it is one that can be trained in."""
    sizes: Counter[str] = Counter()
    for tensor in weight_tensors(base_folder(spec)).values():
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.size
    found = max(sizes, key=lambda name: sizes[name], default="float32")
    return found if found in DTYPES else spec.dtype


def _choose_bases(base: str, spec: BaseSpec) -> list[str]:
    """Which bases are merged onto; where training saw the published weights, both are the same."""
    if base == "auto" and spec.quantization is None:
        say("base", "as published (training did not quantize it)")
        return ["trained"]
    return ["trained", "original"] if base == "auto" else [base]


def _merge_onto(merged: MergedModel, folder: Path, dtype: str, wishes: Wishes, device: str) -> _Done:
    """Writes one merged model and compares it; raises VerificationError if it does not hold."""
    as_loaded = merged.spec.quantization or merged.spec.dtype
    seen = f"the base as trained ({as_loaded})" if merged.onto == "trained" else "the base as published"
    say("merge", f"onto {seen}, summed in float32, written as {dtype}")
    write_model(merged, folder, dtype)
    way = choose_way(wishes.verify, merged, merged.spec.device)
    if way != "logits":
        verified = verify(merged, folder, way, None)
        _report(verified, merged.onto)
        return _Done(merged.onto, verified)
    spec = trained_base(Path(merged.adapters[0]), device, merged.spec.trust_remote_code)
    own = spec if merged.onto == "trained" else replace(spec, quantization=None, double_quant=False)
    reference, weights = refer(merged, own, folder)
    verified = replace(verify(merged, folder, way, reference), weights=weights)
    _report(verified, merged.onto)
    if merged.onto == "trained" or spec.quantization is None:
        return _Done(merged.onto, verified, reference)
    as_trained, _ = refer(merged, spec)
    changed = as_trained.compare(folder, spec.trust_remote_code)
    say("changed", f"against the adapter on the base as trained: {changed}")
    return _Done(merged.onto, verified, as_trained, changed)


def _report(verified: Verified, onto: str) -> None:
    verified.refuse()
    say("compared" if onto == "trained" else "compared, on that base", str(verified))


def _better_of(
    merged: Sequence[MergedModel], folder: Path, dtype: str, wishes: Wishes, device: str, losses: "Losses | None"
) -> _Done:
    """Merges onto each base, shows how they compare with what was trained, and keeps the better one."""
    done: list[tuple[Path, _Done, float | None]] = []
    for one in merged:
        own = folder / f".{one.onto}"
        own.mkdir()
        found = _merge_onto(one, own, dtype, replace(wishes, verify="logits"), device)
        done.append((own, found, losses(own) if losses else None))
    table = table_of("base", "mean KL from what was trained", "adapter's effect lost", "same first choice", "loss")
    for _, found, loss in done:
        fidelity = found.changed or found.verified.fidelity
        if fidelity is not None:
            cells = (f"{fidelity.mean_kl:.1e}", f"{fidelity.share_lost:.2%}", f"{fidelity.top1_agreement:.1%}")
            table.add_row(found.onto, *cells, "not measured" if loss is None else f"{loss:.4f}")
    console().print(table)
    best, found, loss = min(done, key=lambda one: (one[2] or 0.0, one[1].onto != "trained"))
    say("base", f"{found.onto} ({'the lower loss' if loss is not None else 'the weights that were trained on'})")
    for file in best.iterdir():
        file.rename(folder / file.name)
    for own, _, _ in done:
        shutil.rmtree(own)
    return replace(found, losses={one.onto: loss for _, one, loss in done if loss is not None})


def _quantize(folder: Path, found: _Done, kind: str, spec: BaseSpec) -> _Done:
    """The finished model in 4 bits, in the place of the whole one; says what that loses."""
    double = spec.double_quant or spec.quantization is None
    model = load_base(
        BaseSpec(str(folder), quantization=kind, double_quant=double, dtype="bfloat16", device=spec.device)
    )
    small = folder / ".quantized"
    model.save_pretrained(small)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    for file in small.iterdir():
        file.replace(folder / file.name)
    small.rmdir()
    if found.reference is None:
        say("quantized", f"to {kind}; what that loses was not measured")
        return replace(found, quantized=kind)
    from lora_sft.merging.fidelity import compare, logits_of

    lost = compare(logits_of(model.eval(), found.reference.probes), found.reference.adapter, found.reference.base)
    say("quantized", f"to {kind}, against the adapter: {lost}")
    return replace(found, quantized=kind, lost=lost)


def _write_record(
    folder: Path, name: str, adapters: Sequence[Path], blend: Blend, spec: BaseSpec, found: _Done, dtype: str
) -> None:
    """`merge.json` and the model card; the record of the training goes into the card if there is one training."""
    record = {
        "base": {"name": spec.name, "revision": spec.revision},
        "onto": found.onto,
        "dtype": dtype,
        "quantize": found.quantized,
        "combination": blend.kind,
        "adapters": [
            {"name": one.absolute().name, "weight": weight, "sha256": hash_of_file(one / WEIGHTS)}
            for one, weight in zip(adapters, blend.weights, strict=True)
        ],
        "verified": found.summary(),
    }
    (folder / MERGE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    alone = adapters[0] if len(adapters) == 1 else None
    names = [one.absolute().name for one in adapters]
    if alone is None:
        names = [f"{weight:g} · {name}" for name, weight in zip(names, blend.weights, strict=True)]
    manifest = manifest_of(alone) if alone else {}
    card = merged_card(
        manifest if "result" in manifest else None,
        found.summary(),
        name,
        base=spec.name,
        dtype=dtype,
        onto=found.onto,
        quantize=found.quantized,
        adapters=names,
        config=read_run(alone) if alone else None,
        curve=read_metrics(alone) if alone else (),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
