"""A base (and the adapter on it) → a GGUF file, by llama.cpp's own converter, tensor by tensor.

The converter runs in a process of its own: it brings its own `gguf` package, which is newer than the released one that
this process may have loaded, and it sets up logging and the search path as a program does. It asks for each tensor
when it writes it; the answer is the merged one, in float32, so that nothing is rounded before its final type.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lora_sft
from lora_sft.errors import RunError
from lora_sft.exporting.llama_cpp.types import PRECISIONS, Kernel, Shape, type_of
from lora_sft.model.base import BaseSpec
from lora_sft.model.device import peak_bytes

ARENA = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
"""Large tensors go back to the system when they are done with; glibc would keep them for many small arrays after."""

KERNEL_TYPES = ("Q4_K", "Q5_K", "Q6_K")
"""Types for which the converter's package can read, but not round."""


@dataclass(frozen=True)
class Conversion:
    """One file to write.

    Attributes:
        converter: llama.cpp's folder.
        folder: with an adapter, an empty one, which gets configuration and tokenizer; without, the base's own.
        output: the file.
        name: of the model, for the file's metadata.
        precision: its name in PRECISIONS.
        adapter: its folder; None writes the base as it is.
        spec, onto: the base, as `open_merged` takes them.
        pre: llama.cpp's name for the pre-tokenizer; None leaves it to the converter, which knows published ones.
        stop_ids: tokens that end a reply, the most usual first.
        adds_bos: whether text begins with the bos token.
    """

    converter: str
    folder: str
    output: str
    name: str
    precision: str
    adapter: str | None
    spec: dict[str, Any]
    onto: str
    pre: str | None
    stop_ids: list[int]
    adds_bos: bool


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        types: {type: how many tensors}.
        fallbacks: tensors of which a row is no multiple of the wanted type's block, so that another type stands in.
        peak_rss_bytes: of the process that wrote it.
    """

    types: dict[str, int]
    fallbacks: list[str]
    peak_rss_bytes: int


def convert(conversion: Conversion) -> Converted:
    """Writes a whole model.

    Raises:
        RunError: the converter failed; says its last words.
    """
    told = run_script([sys.executable, "-m", __name__], json.dumps(asdict(conversion)))
    return Converted(**json.loads(told.strip().splitlines()[-1]))


def convert_lora(converter: Path, adapter: Path, base: Path, output: Path, precision: str) -> None:
    """Writes an adapter in normal form; of the base, only the configuration is read.

    Raises:
        RunError: the converter failed; says its last words.
    """
    script = [sys.executable, str(converter / "convert_lora_to_gguf.py"), str(adapter), "--base", str(base)]
    run_script([*script, "--outfile", str(output), "--outtype", precision], "")


def run_script(command: list[str], told: str) -> str:
    """Runs a program with this package on its path; returns its standard output."""
    path = os.pathsep.join([str(Path(lora_sft.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep), "TQDM_DISABLE": "1", **ARENA}
    done = subprocess.run(command, input=told, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        words = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise RunError(f"llama.cpp's converter failed: {words[-1] if words else f'exit code {done.returncode}'}")
    return done.stdout


def main() -> None:
    """The process: an order on standard input, what was written as the last line of standard output."""
    import numpy as np
    import torch

    conversion = Conversion(**json.load(sys.stdin))
    sys.path[:0] = [conversion.converter, str(Path(conversion.converter) / "gguf-py")]
    gguf, parts = importlib.import_module("gguf"), importlib.import_module("conversion")
    if PRECISIONS[conversion.precision].body is not None:
        _lend_kernel(gguf)
    np.seterr(over="raise")  # a weight beyond float16 would become infinite in silence
    shapes, tensor = _tensors(conversion)
    with torch.inference_mode():
        settings = parts.ModelBase.load_hparams(Path(conversion.folder), False)
        if "n_positions" in settings:
            settings.setdefault("n_ctx", settings["n_positions"])  # transformers 5 no longer writes GPT-2's second name
        base_class = parts.get_model_class(parts.get_model_architecture(settings, parts.ModelType.TEXT))
        writer = _subclass(base_class, conversion, gguf, parts, shapes, tensor)(
            Path(conversion.folder),
            getattr(gguf.LlamaFileType, PRECISIONS[conversion.precision].file_type),
            Path(conversion.output),
            model_name=conversion.name,
            hparams=settings,
        )
        try:
            writer.write()
        except FloatingPointError:
            raise SystemExit("a weight is larger than float16 can hold: choose quantization bf16 or f32") from None
    converted = Converted(writer.types, writer.fallbacks, peak_bytes("cpu"))
    sys.stdout.write(f"\n{json.dumps(asdict(converted))}\n")


def _tensors(conversion: Conversion) -> tuple[dict[str, tuple[int, ...]] | None, Callable[[str], Any]]:
    """Shapes, and how to get a tensor; None where the converter reads the folder itself."""
    if conversion.adapter is None:
        return None, lambda name: None
    from lora_sft.merging.merged import open_merged

    merged = open_merged(Path(conversion.adapter), BaseSpec(**conversion.spec), conversion.onto)
    merged.write_small_files(Path(conversion.folder), "float32")
    return merged.shapes, merged.tensor


def _lend_kernel(gguf: Any) -> None:
    """Gives the converter's package llama.cpp's rounding for the types that it can only read."""
    kernel = Kernel()

    def rounding(cls: Any, blocks: Any) -> Any:
        return kernel.round(int(cls.qtype), blocks, cls.type_size)

    for name in KERNEL_TYPES:
        getattr(gguf.quants, name).quantize_blocks = classmethod(rounding)


def _subclass(
    base: Any,
    conversion: Conversion,
    gguf: Any,
    parts: Any,
    shapes: dict[str, tuple[int, ...]] | None,
    tensor: Callable[[str], Any],
) -> Any:
    """The converter's class with our tensors, our pre-tokenizer, our stop tokens and our types."""
    import torch

    precision = PRECISIONS[conversion.precision]

    class Model(base):  # type: ignore[misc]
        model_arch = base.model_arch

        def __init__(self, *given: Any, **named: Any) -> None:
            self.types: dict[str, int] = {}
            self.fallbacks: list[str] = []
            super().__init__(*given, **named)
            self.shape = _shape(self, gguf)
            add = self.gguf_writer.add_tensor

            def counted(name: str, data: Any, **more: Any) -> None:
                kind = more["raw_dtype"].name
                self.types[kind] = self.types.get(kind, 0) + 1
                add(name, data, **more)

            self.gguf_writer.add_tensor = counted

        def index_tensors(self, *given: Any, **named: Any) -> Any:
            if shapes is None:
                return super().index_tensors(*given, **named)
            found = {}
            for name, shape in shapes.items():
                if kept := self.filter_tensors((name, lambda name=name, shape=shape: lazy(name, shape))):
                    found[kept[0]] = kept[1]
            return found

        def tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
            forced = super().tensor_force_quant(name, new_name, bid, n_dims)
            if precision.body is None or not isinstance(forced, bool) or n_dims < 2:
                return forced
            chosen = type_of(new_name, self.columns, precision, self.shape)
            if chosen is None:
                return forced if self.stays_whole(new_name, bid) else gguf.GGMLQuantizationType.F16
            kind, stands_in = chosen
            self.fallbacks += [new_name] if stands_in else []
            return getattr(gguf.GGMLQuantizationType, kind)

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Any:
            for new_name, data in super().modify_tensors(data_torch, name, bid):
                self.columns = int(data.shape[-1])
                yield new_name, data

        def stays_whole(self, new_name: str, bid: int | None) -> bool:
            """Whether the converter writes it in float32 on its own account."""
            kept = ("FFN_GATE_INP", "FFN_GATE_INP_SHEXP", "POS_EMBD", "TOKEN_TYPES", "SSM_CONV1D", "SHORTCONV_CONV")
            keys = [getattr(gguf.MODEL_TENSOR, key) for key in kept]
            return not new_name.endswith(".weight") or any(
                self.match_model_tensor_name(new_name, key, bid) for key in keys
            )

        def get_vocab_base_pre(self, tokenizer: Any) -> Any:
            return conversion.pre or super().get_vocab_base_pre(tokenizer)

        def _create_vocab_sentencepiece(self) -> Any:
            # It would import sentencepiece before it looks whether there is anything to read with it.
            if not (self.dir_model / "tokenizer.model").is_file():
                raise FileNotFoundError(self.dir_model / "tokenizer.model")
            return super()._create_vocab_sentencepiece()

        def set_vocab(self) -> None:
            super().set_vocab()
            self.gguf_writer.add_add_bos_token(conversion.adds_bos)
            names = ("add_eos_token_id", "add_eot_token_id", "add_eom_token_id")
            for name, stop in zip(names, conversion.stop_ids, strict=False):
                getattr(self.gguf_writer, name)(stop)

    def lazy(name: str, shape: tuple[int, ...]) -> Any:
        kind = parts.LazyTorchTensor
        empty = kind.meta_with_dtype_and_shape(torch.float32, shape)
        return kind(meta=empty, args=(name,), func=lambda asked: tensor(asked).float())

    return Model


def _shape(model: Any, gguf: Any) -> Shape:
    """What the choice of types depends on, read off the converter's model."""
    mapped = [model.tensor_map.get_name(name, try_suffixes=(".weight",)) or "" for name in model.model_tensors]
    values = {
        int(name.split(".")[1])
        for name in mapped
        if name.startswith("blk.") and name.endswith(("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))
    }
    experts = ("num_local_experts", "num_experts", "n_routed_experts")
    heads = model.find_hparam(["num_attention_heads", "n_head"], optional=True)
    return Shape(
        architecture=gguf.MODEL_ARCH_NAMES[model.model_arch],
        layers=model.block_count,
        experts=model.find_hparam(experts, optional=True) or 0,
        value_layers=sorted(values),
        is_tied="output.weight" not in mapped,
        shares_values=model.find_hparam(["num_key_value_heads"], optional=True) not in (None, heads),
    )


if __name__ == "__main__":
    main()
