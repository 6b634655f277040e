"""Full precision: every number in one type."""

from contextlib import AbstractContextManager
from typing import Any

from fabric_core.contracts import Precision, PrecisionCapabilities, PrecisionPolicy

__all__ = ["FullPrecision"]


class FullPrecision(Precision):
    """Everything in 32 bits, as PyTorch does by itself."""

    capabilities = PrecisionCapabilities(priority=10)

    @property
    def policy(self) -> PrecisionPolicy:
        """Everything is left in the type that it has."""
        return PrecisionPolicy()

    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        """Nothing to do."""
        return None
