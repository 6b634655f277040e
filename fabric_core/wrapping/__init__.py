"""What ``setup`` returns in place of models, optimizers and data loaders."""

from fabric_core.wrapping.dataloader import FabricDataLoader
from fabric_core.wrapping.module import FabricModule
from fabric_core.wrapping.optimizer import FabricOptimizer
from fabric_core.wrapping.setup import Setup
from fabric_core.wrapping.training import Acts, Training
from fabric_core.wrapping.unwrap import is_wrapped, unwrap

__all__ = [
    "Acts",
    "FabricDataLoader",
    "FabricModule",
    "FabricOptimizer",
    "Setup",
    "Training",
    "is_wrapped",
    "unwrap",
]
