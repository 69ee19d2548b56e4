"""The house keeps its shape: imports point down the journey, one file touches TRL, the package loads lazily."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_sft

PACKAGE = Path(lora_sft.__file__).parent

# From the front door down to the ground: a file imports from its own floor or from one below it.
FLOORS = [
    ["__main__"],
    ["cli"],
    ["api"],
    ["report"],
    ["preflight"],
    ["planning"],
    ["exporting"],
    ["merging"],
    ["publishing"],
    ["training"],
    ["preparation"],
    ["model"],
    ["kernels"],
    ["chat"],
    ["data"],
    ["settings"],
    ["dialect"],
    ["config"],
    ["console", "resources"],
    ["errors"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imports_of(path: Path) -> set[str]:
    """Modules of our package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lora_sft."):
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "lora_sft":
            found |= {f"lora_sft.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("lora_sft.")}
    return found


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_room_has_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_the_journey(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    up = {module for module in imports_of(path) if FLOOR[room_of(module)] < FLOOR[here]}
    assert not up, f"{path.name} imports upward: {up}"


def test_one_file_touches_trl():
    touching = [path.name for path in modules() if "trl" in _roots(path)]
    assert touching == ["trainer.py"]


def _roots(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = [name.name for node in tree if isinstance(node, ast.Import) for name in node.names]
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names += [node.module or "" for node in tree if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["merge", "--help"], ["init", "-"], ["schema"], ["templates"]]
)
def test_quick_commands_do_not_import_torch(words):
    code = (
        "import sys\nfrom lora_sft.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'trl'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_importing_the_package_imports_nothing_heavy():
    code = "import lora_sft, sys; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_public_names_are_there():
    assert lora_sft.__all__ == [
        "Chat",
        "Example",
        "LoraSftError",
        "Plan",
        "Preview",
        "Rendered",
        "Run",
        "RunConfig",
        "encode",
        "evaluate",
        "export",
        "finetune",
        "load",
        "merge",
        "plan",
        "preview",
        "render",
        "validate",
    ]
    for name in lora_sft.__all__:
        assert getattr(lora_sft, name).__doc__


@pytest.mark.skipif((PACKAGE / "export").is_dir(), reason="a folder of this name takes the place of the verb")
def test_the_verbs_are_functions_whatever_was_imported_before():
    code = (
        "import lora_sft.api, lora_sft, importlib, pkgutil\n"
        "for room in pkgutil.iter_modules(lora_sft.__path__):\n"
        "    room.name == '__main__' or importlib.import_module(f'lora_sft.{room.name}')\n"
        "from lora_sft import export, merge\n"
        "assert [verb.__name__ for verb in (export, merge)] == ['export', 'merge']"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_telemetry_is_off_unless_the_user_turns_it_on():
    code = "import lora_sft, os; print(os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    environment = {"PATH": "", "PYTHONPATH": str(PACKAGE.parent)}
    off = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    on = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment | {"HF_HUB_DISABLE_TELEMETRY": "0"},
    )
    assert (off.stdout.strip(), on.stdout.strip()) == ("1", "0")
