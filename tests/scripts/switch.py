# mypy: ignore-errors
"""The one import that differs: ``LIBRARY=lightning`` takes Lightning Fabric, anything else this project."""

import os

if os.environ.get("LIBRARY") == "lightning":
    from lightning.fabric import Fabric, is_wrapped, seed_everything
    from lightning.fabric.loggers import CSVLogger, TensorBoardLogger
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.utilities import (
        AttributeDict,
        ThroughputMonitor,
        measure_flops,
        move_data_to_device,
        rank_zero_only,
        suggested_max_num_workers,
    )
else:
    from fabric_core import Fabric, is_wrapped, seed_everything
    from fabric_core.utilities import (
        AttributeDict,
        ThroughputMonitor,
        measure_flops,
        move_data_to_device,
        rank_zero_only,
        suggested_max_num_workers,
    )
    from fabric_plugins.loggers import CSVLogger, TensorBoardLogger
    from fabric_plugins.strategies import DDPStrategy

__all__ = [
    "AttributeDict",
    "CSVLogger",
    "DDPStrategy",
    "Fabric",
    "TensorBoardLogger",
    "ThroughputMonitor",
    "is_wrapped",
    "measure_flops",
    "move_data_to_device",
    "rank_zero_only",
    "seed_everything",
    "suggested_max_num_workers",
]
