"""Two computations of the same logits → how far they are apart, and what of it can be rounding."""

from typing import NamedTuple


class Difference(NamedTuple):
    """The largest difference between two sets of logits, and what of it can be rounding."""

    found: float
    allowed: float

    @property
    def is_real(self) -> bool:
        """Whether it is more than rounding; also if it is no number."""
        return not self.found <= self.allowed

    def __str__(self) -> str:
        return f"{self.found:.2g} (rounding: {self.allowed:.1g})"
