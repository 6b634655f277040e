"""A third party's precision: every number in 64 bits."""

import torch

from fabric_core import Precision
from fabric_core.contracts import PrecisionPolicy


class Float64(Precision):
    """Parameters, inputs and outputs in 64 bits."""

    @property
    def policy(self) -> PrecisionPolicy:
        """Everything in 64 bits."""
        return PrecisionPolicy(param_dtype=torch.float64, input_dtype=torch.float64)
