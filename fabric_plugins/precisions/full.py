"""Full precision: every number in the type that it has."""

from typing import Final

from fabric_core.contracts import Precision, PrecisionPolicy, Preset

__all__ = ["ALIAS", "FullPrecision"]


class FullPrecision(Precision):
    """Everything in 32 bits, as PyTorch does by itself: nothing is converted."""

    @property
    def policy(self) -> PrecisionPolicy:
        """Everything is left in the type that it has."""
        return PrecisionPolicy()


ALIAS: Final = Preset.of(FullPrecision)
"""What the name ``32`` means."""
