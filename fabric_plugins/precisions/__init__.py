"""Precisions: the number types of training."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_plugins.precisions.full import FullPrecision
    from fabric_plugins.precisions.mixed import BFloat16MixedPrecision, Float16MixedPrecision, MixedPrecision
    from fabric_plugins.precisions.true import BFloat16Precision, DoublePrecision, Float16Precision, HalfPrecision

__all__ = [
    "BFloat16MixedPrecision",
    "BFloat16Precision",
    "DoublePrecision",
    "Float16MixedPrecision",
    "Float16Precision",
    "FullPrecision",
    "HalfPrecision",
    "MixedPrecision",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "FullPrecision": "full",
        "DoublePrecision": "true",
        "BFloat16Precision": "true",
        "Float16Precision": "true",
        "HalfPrecision": "true",
        "MixedPrecision": "mixed",
        "BFloat16MixedPrecision": "mixed",
        "Float16MixedPrecision": "mixed",
    },
)
