"""PyTorch's default floating-point type, for one thread: what makes a model in a precision's type."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from fabric_core._torch import run_backward

__all__ = ["DefaultDtype"]

_ALWAYS: Final = frozenset({
    torch.empty, torch.empty_permuted, torch.empty_strided, torch.zeros, torch.ones, torch.eye, torch.rand, torch.randn,
    torch.linspace, torch.logspace, torch.range, torch.scalar_tensor, torch.fft.fftfreq, torch.fft.rfftfreq,
    torch.bartlett_window, torch.blackman_window, torch.hamming_window, torch.hann_window, torch.kaiser_window,
})  # fmt: skip
"""Make floating-point tensors, whatever their arguments."""

_INFERRING: Final = frozenset({
    torch.arange, torch.as_tensor, torch.asarray, torch.full, torch.normal, torch.tensor,
})  # fmt: skip
"""Make floating-point tensors of the default type where their arguments are Python's floats."""

_MAKERS: Final = _ALWAYS | _INFERRING
_DATA: Final = ("data", "obj", "fill_value", "start", "end", "step", "mean", "std")
"""The keyword arguments of the inferring functions that a type is inferred from."""
_NUMBERS: Final = frozenset({bool, int, float})
_BACKWARD: Final = frozenset({torch.Tensor.backward, torch.autograd.backward})
"""What may run parts of a forward pass again, where activations were not kept."""


class DefaultDtype(TorchFunctionMode):
    """A context in which functions that make tensors use a type where none is given.

    It does for one thread what ``torch.set_default_dtype`` does for the process, as ``with torch.device(...)`` does for
    devices. What is made from tensors or arrays keeps their type, and integers, booleans and complex numbers theirs.
    Where a backward pass runs in it, so do the forward passes that it runs again, also in the threads of the engine.

    Args:
        dtype: The type, a floating-point one.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Add the type to a call that makes a tensor and gives none."""
        kwargs = kwargs or {}
        if func in _BACKWARD:
            with self:  # a mode is off while it is asked
                return run_backward(*args, **kwargs)
        if func in _MAKERS and kwargs.get("dtype") is None and kwargs.get("out") is None:
            data = (*args, *(kwargs[name] for name in _DATA if name in kwargs))
            if func in _ALWAYS or _is_python_floats(data):
                kwargs = {**kwargs, "dtype": self._dtype}
        return func(*args, **kwargs)


def _is_python_floats(data: Any) -> bool:
    """Say whether nested lists and tuples hold Python's numbers alone, a float among them, or nothing at all."""
    kinds = set(_kinds(data))
    return kinds <= _NUMBERS and (float in kinds or not kinds)


def _kinds(data: Any) -> Iterator[type]:
    if isinstance(data, list | tuple):
        for part in data:
            yield from _kinds(part)
    else:
        yield type(data)
