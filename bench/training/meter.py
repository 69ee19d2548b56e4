"""A process → the seconds that it computed and the memory that it held at most, since the meter was zeroed."""

import time
from pathlib import Path


def _of_status(name: str) -> int:
    """A line of /proc/self/status, in bytes; elsewhere than on Linux the peak since the process began."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """CPU seconds and resident bytes of this process, or with CUDA wall-clock seconds and bytes allocated there."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self._clock = 0.0

    def held_bytes(self) -> int:
        """What is held now."""
        if self.on_gpu:
            import torch

            return int(torch.cuda.memory_allocated())
        return _of_status("VmRSS")

    def zero(self) -> None:
        """Starts anew."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            reset = Path("/proc/self/clear_refs")
            if reset.exists():
                reset.write_text("5")  # the peak of resident memory becomes what is resident now
        self._clock = self._now()

    def read(self) -> tuple[float, int]:
        """Seconds, and the most bytes held, since `zero`."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
            return self._now() - self._clock, int(torch.cuda.max_memory_allocated())
        return self._now() - self._clock, _of_status("VmHWM")

    def _now(self) -> float:
        return time.perf_counter() if self.on_gpu else time.process_time()
