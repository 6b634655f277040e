"""In which floating-point type a plugin is judged, and how exact its results must be."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import torch

__all__ = ["computing_in", "exact", "widest", "widest_of"]

_EXACT: Final = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
"""How far numbers may be off that were summed in another order, by their type; the widest first."""

_widest: ContextVar[torch.dtype] = ContextVar("widest", default=torch.float64)


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Let models and batches be of a type inside the block."""
    token = _widest.set(dtype)
    try:
        yield
    finally:
        _widest.reset(token)


def widest() -> torch.dtype:
    """Give the type of models and batches: the widest that the plugin takes, and the device."""
    return _widest.get()


def widest_of(takes: Callable[[torch.dtype], bool]) -> torch.dtype:
    """Give the widest type that is taken; 64 bits where none is."""
    return next((dtype for dtype in _EXACT if takes(dtype)), torch.float64)


def exact() -> float:
    """Say how far numbers of that type may be off that were summed in another order."""
    return _EXACT[widest()]
