"""True precisions: parameters, inputs and computations in one type."""

from typing import ClassVar, Final

import torch

from fabric_core.contracts import Precision, PrecisionPolicy, Preset

__all__ = ["ALIAS", "BFloat16Precision", "DoublePrecision", "Float16Precision"]


class _TruePrecision(Precision):
    """Everything in one type; outputs come back in 32 bits, PyTorch's default type."""

    dtype: ClassVar[torch.dtype]

    @property
    def policy(self) -> PrecisionPolicy:
        """Parameters, inputs and computations in the one type; gradients are reduced in it too."""
        return PrecisionPolicy(
            param_dtype=self.dtype,
            compute_dtype=self.dtype,
            input_dtype=self.dtype,
            output_dtype=torch.float32,
        )


class DoublePrecision(_TruePrecision):
    """Everything in 64 bits."""

    dtype = torch.float64


class BFloat16Precision(_TruePrecision):
    """Everything in bfloat16: half the memory, 8 bits of mantissa."""

    dtype = torch.bfloat16


class Float16Precision(_TruePrecision):
    """Everything in float16, without loss scaling: for inference, or where gradients are known to fit its range."""

    dtype = torch.float16


ALIAS: Final = Preset.of(DoublePrecision)
"""What the name ``64`` means."""
