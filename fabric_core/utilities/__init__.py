"""What training scripts use beside a ``Fabric``, under Lightning Fabric's names."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_core.utilities.collective import Collective, SingleDeviceCollective, TorchCollective
    from fabric_core.utilities.data import AttributeDict, move_data_to_device, suggested_max_num_workers
    from fabric_core.utilities.filesystem import is_shared_filesystem
    from fabric_core.utilities.progress import track
    from fabric_core.utilities.rank_zero import (
        rank_zero_deprecation,
        rank_zero_info,
        rank_zero_only,
        rank_zero_warn,
    )
    from fabric_core.utilities.throughput import Throughput, ThroughputMonitor, measure_flops

_HOMES = {
    "AttributeDict": "data",
    "Collective": "collective",
    "SingleDeviceCollective": "collective",
    "Throughput": "throughput",
    "ThroughputMonitor": "throughput",
    "TorchCollective": "collective",
    "is_shared_filesystem": "filesystem",
    "measure_flops": "throughput",
    "move_data_to_device": "data",
    "rank_zero_deprecation": "rank_zero",
    "rank_zero_info": "rank_zero",
    "rank_zero_only": "rank_zero",
    "rank_zero_warn": "rank_zero",
    "suggested_max_num_workers": "data",
    "track": "progress",
}

__all__ = [
    "AttributeDict",
    "Collective",
    "SingleDeviceCollective",
    "Throughput",
    "ThroughputMonitor",
    "TorchCollective",
    "is_shared_filesystem",
    "measure_flops",
    "move_data_to_device",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "suggested_max_num_workers",
    "track",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
