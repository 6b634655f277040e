"""From wrapped objects back to the user's own."""

from typing import Any

from fabric_core.wrapping.dataloader import FabricDataLoader
from fabric_core.wrapping.module import FabricModule
from fabric_core.wrapping.optimizer import FabricOptimizer

__all__ = ["is_wrapped", "unwrap"]


def is_wrapped(obj: object) -> bool:
    """Say whether an object is a wrapped model (also inside ``torch.compile``), optimizer or data loader."""
    inner = getattr(obj, "_orig_mod", obj) if not isinstance(obj, FabricModule) else obj
    return isinstance(inner, FabricModule | FabricOptimizer | FabricDataLoader)


def unwrap(obj: Any) -> Any:
    """Give the user's own object for a wrapped one, in nested dicts, lists and tuples too; others as they are."""
    if isinstance(obj, FabricModule):
        return obj.module
    if isinstance(obj, FabricOptimizer):
        return obj.optimizer
    if isinstance(obj, FabricDataLoader):
        return obj.__dict__["_fabric_inner"]
    if isinstance(obj, dict):
        return type(obj)((key, unwrap(value)) for key, value in obj.items())
    if isinstance(obj, list | tuple) and type(obj) in {list, tuple}:
        return type(obj)(unwrap(value) for value in obj)
    return obj
