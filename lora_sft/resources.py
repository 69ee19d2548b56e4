"""Where the files that ship with the package lie: `templates/` and `examples/`."""

from pathlib import Path


def shipped(folder: str) -> Path:
    """The folder `templates` or `examples`: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / folder
    return installed if installed.is_dir() else package.parent / folder
