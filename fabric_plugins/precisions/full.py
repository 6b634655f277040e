"""Full precision: every number in one type."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from fabric_core.contracts import Precision, PrecisionCapabilities, PrecisionPolicy

__all__ = ["FullPrecision"]


class FullPrecision(Precision):
    """Everything in 32 bits, as PyTorch does by itself."""

    capabilities = PrecisionCapabilities(priority=10)

    @property
    def policy(self) -> PrecisionPolicy:
        """Parameters are left in the type that they have."""
        return PrecisionPolicy(input_dtype=torch.float32, output_dtype=torch.float32)

    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        """Nothing to do."""
        return None
