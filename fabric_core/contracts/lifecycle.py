"""Life-cycle hooks: for observers, who change nothing."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fabric_core.collectives import World
from fabric_core.markers import event

__all__ = ["LifeCycle"]


class LifeCycle:
    """The hooks that an extension may implement with ``@hookimpl``; what changes a behaviour wraps it instead.

    ``fabric`` is the ``Fabric`` that it happened to, with its ``plan``, its ``models`` and its ``step_count``; a
    listener takes those arguments that it needs.
    """

    @event
    def configured(self, fabric: Any, plan: Any) -> None:
        """A ``Fabric`` was built, and this is its plan."""

    @event
    def launched(self, fabric: Any, world: World) -> None:
        """This process has joined the others."""

    @event
    def module_set_up(self, fabric: Any, module: nn.Module) -> None:
        """A model was set up; this is what the user gets."""

    @event
    def optimizer_set_up(self, fabric: Any, optimizer: Optimizer) -> None:
        """An optimizer was set up; this is what the user gets."""

    @event
    def stepped(self, fabric: Any, optimizer: Optimizer) -> None:
        """A call of a wrapped optimizer's ``step`` is over, also where the precision skipped it."""

    @event
    def checkpoint_saved(self, fabric: Any, path: Path) -> None:
        """A checkpoint is there, whole."""

    @event
    def checkpoint_loaded(self, fabric: Any, path: Path) -> None:
        """A checkpoint was loaded into the state that was given."""

    @event
    def failed(self, fabric: Any, error: BaseException) -> None:
        """An exception leaves ``with Fabric(...)`` or the function that was launched, or ends the script."""

    @event
    def torn_down(self, fabric: Any) -> None:
        """The ``Fabric`` has released its resources; or the script ends, and nothing tore it down."""
