"""What one side of a race is told: which library trains what, and how. It goes to its process as JSON."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Side:
    """A training as one library does it.

    Attributes:
        library: `ours`, `trl`, `liger` (TRL with Liger's kernels) or `unsloth`.
        model, rows, adapter: the folder, the file and the folder that all sides share.
        dtype: of the arithmetic: `bf16` or `fp32`.
        steps: optimizer steps, of one micro-batch each.
        order: `sequential`, `random` or `group_by_length`.
        packing: rows of `max_length` tokens are filled with several conversations.
        padding_free: TRL's: the rows of a micro-batch end to end.
        recompute: gradient checkpointing.
        keeps_float32: the adapter stays float32, where TRL would make it bfloat16.
        device: `cpu` or `cuda`.
    """

    library: str
    model: str
    rows: str
    adapter: str
    dtype: str = "bf16"
    steps: int = 4
    micro_batch: int = 8
    order: str = "sequential"
    packing: bool = False
    padding_free: bool = False
    max_length: int = 4096
    recompute: bool = False
    keeps_float32: bool = False
    rank: int = 16
    seed: int = 0
    device: str = "cpu"

    def to_json(self) -> str:
        """What the process of the side reads."""
        return json.dumps(asdict(self))
