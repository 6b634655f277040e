"""What strategies whose parameters are DTensors share."""

from fabric_plugins.strategies._sharding.materialise import check_materialisable, materialise, move_to
from fabric_plugins.strategies._sharding.memory import divided_memory
from fabric_plugins.strategies._sharding.strategy import ShardedStrategy
from fabric_plugins.strategies._sharding.units import ModulePolicy, choose_modules

__all__ = [
    "ModulePolicy",
    "ShardedStrategy",
    "check_materialisable",
    "choose_modules",
    "divided_memory",
    "materialise",
    "move_to",
]
