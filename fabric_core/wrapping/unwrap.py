"""From wrapped objects back to the user's own."""

from typing import Any

from fabric_core.contracts import map_tensors
from fabric_core.wrapping.compiled import uncompiled
from fabric_core.wrapping.dataloader import FabricDataLoader
from fabric_core.wrapping.module import FabricModule
from fabric_core.wrapping.optimizer import FabricOptimizer

__all__ = ["is_wrapped", "unwrap"]


def is_wrapped(obj: object) -> bool:
    """Say whether an object is a wrapped model (also inside ``torch.compile``), optimizer or data loader."""
    return isinstance(uncompiled(obj), FabricModule | FabricOptimizer | FabricDataLoader)


def unwrap(obj: Any) -> Any:
    """Give the user's own object for a wrapped one, and anything else as it is.

    Goes into dicts, lists, tuples, named tuples, dataclasses and containers registered with ``torch.utils._pytree``;
    one that holds nothing wrapped is the very same object.
    """
    return map_tensors(obj, _itself, _unwrapped)


def _itself(value: Any) -> Any:
    return value


def _unwrapped(obj: Any) -> Any:
    inner = uncompiled(obj)
    if isinstance(inner, FabricModule):
        return inner.module
    if isinstance(inner, FabricOptimizer):
        return inner.optimizer
    if isinstance(inner, FabricDataLoader):
        return inner.dataloader
    return obj
