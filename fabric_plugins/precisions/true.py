"""True precisions: parameters, inputs and computations in one type."""

import re
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ClassVar, Final

import torch

from fabric_core.contracts import DefaultDtype, PluginOptions, Precision, PrecisionPolicy, Preset

__all__ = ["ALIAS", "BFloat16Precision", "DoublePrecision", "Float16Precision", "HalfPrecision", "TrueOptions"]


class TrueOptions(PluginOptions):
    """The options of true precisions."""

    default_dtype_in_forward: bool = False
    """Let what makes tensors in ``forward`` without a type, such as ``torch.zeros(1)``, make them in the precision's
    type, in this thread; it takes about a microsecond for each call of a torch function. Then ``fabric.backward`` must
    run the backward pass wherever activations are computed again."""


class _TruePrecision(Precision):
    """Everything in one type; outputs come back in 32 bits, PyTorch's default type."""

    Options = TrueOptions
    options: TrueOptions
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

    def forward_context(self, device_type: str) -> AbstractContextManager[Any]:
        """Make tensors in the one type, as the option says; without it, name it where types met that don't fit."""
        return DefaultDtype(self.dtype) if self.options.default_dtype_in_forward else _NamingTheOption(self.dtype)

    def backward_context(self) -> AbstractContextManager[Any] | None:
        """Likewise for what the backward pass computes again."""
        return DefaultDtype(self.dtype) if self.options.default_dtype_in_forward else None


class _NamingTheOption:
    """Adds a note to PyTorch's error that an operator was given float32 and another type.

    Args:
        dtype: The other type.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Look at the error, if there is one."""
        if isinstance(error, RuntimeError) and _FLOAT32.search(str(error)) and _NAMES[self._dtype].search(str(error)):
            error.add_note(
                f"The precision computes in {self._dtype}, and what forward makes without a type, as torch.zeros(1)"
                " does, is of float32. Write torch.zeros(1, dtype=x.dtype), or choose the precision with the option"
                " default_dtype_in_forward=true."
            )


_FLOAT32: Final = re.compile(r"\b(float|float32)\b", re.IGNORECASE)
_NAMES: Final = {
    torch.bfloat16: re.compile(r"\bbfloat16\b", re.IGNORECASE),
    torch.float16: re.compile(r"\b(half|float16)\b", re.IGNORECASE),
    torch.float64: re.compile(r"\b(double|float64)\b", re.IGNORECASE),
}
"""What PyTorch's errors call each type."""


class DoublePrecision(_TruePrecision):
    """Everything in 64 bits."""

    dtype = torch.float64


class BFloat16Precision(_TruePrecision):
    """Everything in bfloat16: half the memory, 8 bits of mantissa."""

    dtype = torch.bfloat16


class Float16Precision(_TruePrecision):
    """Everything in float16, without loss scaling: for inference, or where gradients are known to fit its range."""

    dtype = torch.float16


def HalfPrecision(precision: str = "16-true") -> BFloat16Precision | Float16Precision:  # noqa: N802 - Lightning Fabric's
    """Make a true precision of 16 bits by its name, ``"16-true"`` or ``"bf16-true"``.

    Raises:
        ValueError: It has another name.
    """
    if precision not in {"16-true", "bf16-true"}:
        raise ValueError(f"HalfPrecision takes 16-true or bf16-true, and got {precision!r}")
    return Float16Precision() if precision == "16-true" else BFloat16Precision()


ALIAS: Final = Preset.of(DoublePrecision)
"""What the name ``64`` means."""
