"""Mixed precision: parameters in 32 bits, matrix work in 16."""

from contextlib import AbstractContextManager
from typing import Any, Final

import torch

from fabric_core.contracts import Precision, PrecisionCapabilities, PrecisionPolicy

__all__ = ["BFloat16MixedPrecision"]

_BFLOAT16: Final = PrecisionPolicy(
    compute_dtype=torch.bfloat16,
    input_dtype=torch.float32,
    output_dtype=torch.float32,
    autocast=True,
)


class BFloat16MixedPrecision(Precision):
    """Parameters in 32 bits, matrix work in bfloat16 through autocast; the loss needs no scaling."""

    capabilities = PrecisionCapabilities(priority=0)

    @property
    def policy(self) -> PrecisionPolicy:
        """Autocast to bfloat16; outputs come back in 32 bits."""
        return _BFLOAT16

    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        """Autocast."""
        return torch.autocast(device_type, torch.bfloat16)
