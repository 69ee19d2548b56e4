"""Time and memory of a training step, beside plain TRL."""

import getpass
import tempfile
from pathlib import Path

CACHE = Path(tempfile.gettempdir()) / f"lora_sft-bench-{getpass.getuser()}"
"""Models, rows and adapters are kept here for the next bench."""
