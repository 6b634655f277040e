"""What ``setup`` gives back in place of models, optimizers and data loaders."""

from fabric_core.wrapping.backward_guard import BackwardGuard, BackwardPass, backward_guard
from fabric_core.wrapping.checks import check_counts, check_model, check_optimizer, check_same, check_trains
from fabric_core.wrapping.compiled import compile_again, uncompiled
from fabric_core.wrapping.dataloader import FabricDataLoader, seed_apart, shard, to_device
from fabric_core.wrapping.gradient_sync import GradientSync, gradient_sync
from fabric_core.wrapping.module import Around, FabricModule, Route, first_device, strategy_module
from fabric_core.wrapping.optimizer import FabricOptimizer, wrap_optimizer
from fabric_core.wrapping.step_guard import StepGuard
from fabric_core.wrapping.unwrap import is_wrapped, unwrap

__all__ = [
    "Around",
    "BackwardGuard",
    "BackwardPass",
    "FabricDataLoader",
    "FabricModule",
    "FabricOptimizer",
    "GradientSync",
    "Route",
    "StepGuard",
    "backward_guard",
    "check_counts",
    "check_model",
    "check_optimizer",
    "check_same",
    "check_trains",
    "compile_again",
    "first_device",
    "gradient_sync",
    "is_wrapped",
    "seed_apart",
    "shard",
    "strategy_module",
    "to_device",
    "uncompiled",
    "unwrap",
    "wrap_optimizer",
]
