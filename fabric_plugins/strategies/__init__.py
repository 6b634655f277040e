"""Strategies: how processes train one model together."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_plugins.strategies.ddp import DDPStrategy
    from fabric_plugins.strategies.fsdp import FSDPStrategy
    from fabric_plugins.strategies.model_parallel import ModelParallelStrategy
    from fabric_plugins.strategies.single_device import SingleDeviceStrategy

__all__ = ["DDPStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "DDPStrategy": "ddp",
        "FSDPStrategy": "fsdp",
        "ModelParallelStrategy": "model_parallel",
        "SingleDeviceStrategy": "single_device",
    },
)
