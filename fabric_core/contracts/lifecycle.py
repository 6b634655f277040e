"""Life-cycle hooks: for observers, who change nothing."""

from pathlib import Path
from typing import Any

from torch import nn

from fabric_core.collectives import World
from fabric_core.markers import event

__all__ = ["LifeCycle"]


class LifeCycle:
    """The hooks that an extension may listen to with ``@hookimpl``; what changes a behaviour wraps it instead."""

    @event
    def configured(self, plan: Any) -> None:
        """A ``Fabric`` was built, and this is its plan."""

    @event
    def launched(self, world: World) -> None:
        """This process has joined the others."""

    @event
    def module_set_up(self, module: nn.Module) -> None:
        """A model was set up; this is what the user gets."""

    @event
    def checkpoint_saved(self, path: Path) -> None:
        """A checkpoint is there, whole."""

    @event
    def torn_down(self) -> None:
        """The ``Fabric`` has given back all that it took."""
