"""Nothing → where llama.cpp's own converter lies, and whether its runtime is installed.

Both come from packages. The runtime is a prebuilt wheel (`xllamacpp`). The converter is Python that only lies in
llama.cpp's source, and the source lies in the source archive of `llama-cpp-python`: it is fetched once, with the
user's own pip and by its hash, and its Python files are kept beside our cache folder.
"""

import ast
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lora_sft.console import say
from lora_sft.errors import ModelError
from lora_sft.preparation.cache import cache_folder

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
PARTS = (*SCRIPTS, "conversion", "gguf-py/gguf", "LICENSE")
RUNTIME = "xllamacpp"

SECONDS_TO_FETCH = 600


def find_converter() -> Path | None:
    """The folder with llama.cpp's converter: a checkout named by LLAMA_CPP_DIR, or what was fetched before.

    Raises:
        ModelError: LLAMA_CPP_DIR names a folder without the converter.
    """
    if given := os.environ.get("LLAMA_CPP_DIR"):
        folder = Path(given).expanduser()
        if missing := [part for part in (*SCRIPTS, "conversion", "gguf-py/gguf") if not (folder / part).exists()]:
            raise ModelError(
                f"LLAMA_CPP_DIR={given}: has no {missing[0]}; name a checkout of llama.cpp from 2026, or unset it"
            )
        return folder
    kept = _kept()
    return kept if kept.is_dir() else None


def the_converter() -> Path:
    """The converter's folder, fetched if need be.

    Raises:
        ModelError: it cannot be had.
    """
    return find_converter() or fetch_converter()


def fetch_converter() -> Path:
    """Fetches the source archive with pip (77 MB, by its hash) and keeps the converter's Python files.

    Raises:
        ModelError: pip cannot have it.
    """
    kept = _kept()
    say("converter", f"fetching llama.cpp's converter with pip, once ({PACKAGE} {VERSION}, 77 MB)")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        unpacked = _unpack(_download(Path(scratch)), Path(scratch))
        shutil.rmtree(kept, ignore_errors=True)
        unpacked.rename(kept)
    return kept


def known_architectures(converter: Path) -> set[str]:
    """Names of the architectures (as in `config.json`) that the converter has a text model for; read, not run."""
    tree = ast.parse((converter / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "TEXT_MODEL_MAP":
            return set(ast.literal_eval(node.value)) if node.value else set()
    raise ModelError(
        f"{converter}: this llama.cpp does not list its architectures where one from 2026 does; unset LLAMA_CPP_DIR"
    )


def runtime_is_installed() -> bool:
    """Whether llama.cpp's runtime can be started."""
    return importlib.util.find_spec(RUNTIME) is not None


def sentencepiece_is_installed() -> bool:
    """Whether the converter can read a `tokenizer.model`."""
    return importlib.util.find_spec("sentencepiece") is not None


def _kept() -> Path:
    # Beside the cache of prepared data, not inside: there the oldest folders are forgotten.
    root = cache_folder("auto")
    return root.with_name(f"{root.name}-tools") / f"llama.cpp-{VERSION}"


def _download(scratch: Path) -> Path:
    """The source archive in `scratch`; pip checks the hash before it looks inside, and so do we."""
    (scratch / "wanted.txt").write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--no-binary", PACKAGE, "--require-hashes", "-r", str(scratch / "wanted.txt"), "--dest", str(scratch)),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_FETCH, check=False)
        problem = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        problem = [f"no answer in {SECONDS_TO_FETCH} seconds"]
    archives = list(scratch.glob("*.tar.gz"))
    if problem or len(archives) != 1:
        raise ModelError(
            f"llama.cpp's converter cannot be fetched with pip: {' '.join(problem) or 'no archive came'}; give this "
            "machine a package index, or set LLAMA_CPP_DIR to a checkout of llama.cpp"
        )
    found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if found != SHA256:
        raise ModelError(f"{archives[0].name}: is not the archive that was expected (sha256 {found})")
    return archives[0]


def _unpack(archive: Path, scratch: Path) -> Path:
    """Only the converter's files out of the archive."""
    folder = scratch / "converter"
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inside = member.name.partition("/vendor/llama.cpp/")
            if member.isfile() and any(inside == part or inside.startswith(f"{part}/") for part in PARTS):
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                if (content := tar.extractfile(member)) is not None:
                    target.write_bytes(content.read())
    return folder
