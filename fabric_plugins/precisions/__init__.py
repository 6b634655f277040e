"""Precisions: the number types of training."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_plugins.precisions.full import FullPrecision
    from fabric_plugins.precisions.mixed import BFloat16MixedPrecision

__all__ = ["BFloat16MixedPrecision", "FullPrecision"]

__getattr__, __dir__ = lazy(__name__, {"FullPrecision": "full", "BFloat16MixedPrecision": "mixed"})
