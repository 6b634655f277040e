"""Train a PyTorch model on any hardware, with any strategy, in any precision; each is a plugin.

The names are imported when they are first used, so that ``import fabric_core`` costs next to nothing.
"""

from typing import TYPE_CHECKING, Any

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_core.binding import around
    from fabric_core.choosing.registry import register
    from fabric_core.contracts import (
        Accelerator,
        Checkpoint,
        Launcher,
        Logger,
        Precision,
        Strategy,
        Wrapper,
        hookimpl,
    )
    from fabric_core.fabric import Fabric
    from fabric_core.running.seeding import seed_everything
    from fabric_core.wrapping import (
        FabricDataLoader,
        FabricModule,
        FabricOptimizer,
        is_wrapped,
        unwrap,
    )

_HOMES = {
    "Accelerator": "contracts",
    "Checkpoint": "contracts",
    "Fabric": "fabric",
    "FabricDataLoader": "wrapping",
    "FabricModule": "wrapping",
    "FabricOptimizer": "wrapping",
    "Launcher": "contracts",
    "Logger": "contracts",
    "Precision": "contracts",
    "Strategy": "contracts",
    "Wrapper": "contracts",
    "around": "binding",
    "hookimpl": "contracts",
    "is_wrapped": "wrapping",
    "register": "choosing.registry",
    "seed_everything": "running.seeding",
    "unwrap": "wrapping",
}

__all__ = [
    "Accelerator",
    "Checkpoint",
    "Fabric",
    "FabricDataLoader",
    "FabricModule",
    "FabricOptimizer",
    "Launcher",
    "Logger",
    "Precision",
    "Strategy",
    "Wrapper",
    "around",
    "hookimpl",
    "is_wrapped",
    "register",
    "seed_everything",
    "unwrap",
]


_get, __dir__ = lazy(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    """Give a public name, or the version of the distribution, at its first use."""
    return _version() if name == "__version__" else _get(name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fabric-registry")
    except PackageNotFoundError:  # a source tree that is not installed
        return "unknown"
