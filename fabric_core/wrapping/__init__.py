"""What ``setup`` gives back in place of models, optimizers and data loaders."""

from fabric_core.wrapping.dataloader import FabricDataLoader, shard, to_device
from fabric_core.wrapping.module import FabricModule, Route
from fabric_core.wrapping.optimizer import FabricOptimizer, wrap_optimizer
from fabric_core.wrapping.unwrap import is_wrapped, unwrap

__all__ = [
    "FabricDataLoader",
    "FabricModule",
    "FabricOptimizer",
    "Route",
    "is_wrapped",
    "shard",
    "to_device",
    "unwrap",
    "wrap_optimizer",
]
