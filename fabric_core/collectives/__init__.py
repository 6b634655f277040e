"""How ranks exchange data: the interface, its two implementations, and who a process is among the others."""

from fabric_core.collectives.interface import Collectives, SingleProcess, check_reduction, check_source
from fabric_core.collectives.process_group import ProcessGroup
from fabric_core.collectives.world import ProcessInfo, World

__all__ = [
    "Collectives",
    "ProcessGroup",
    "ProcessInfo",
    "SingleProcess",
    "World",
    "check_reduction",
    "check_source",
]
