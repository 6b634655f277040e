"""The contract of a wrapper: transforms what is set up, beside the strategy."""

from abc import ABC
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts._spec import Plugin
from fabric_core.contracts.capabilities import WrapperCapabilities
from fabric_core.markers import behaviour

__all__ = ["Wrapper"]


class Wrapper(Plugin, ABC):
    """Transforms a module before or after the strategy wraps it, gives it a context, or wraps optimizers and loaders.

    There may be any number; they act in the user's order, which must agree with the order that they declare.
    """

    kind = "wrapper"

    capabilities: ClassVar[WrapperCapabilities] = WrapperCapabilities()
    """What the wrapper declares."""

    @behaviour
    def wrap_module(self, module: nn.Module) -> nn.Module:
        """Transform a module.

        Args:
            module: The user's module at the stage ``"before_strategy"``, what the strategy made of it at the other.

        Returns:
            The module to use in its place; before the strategy it must be the same object, changed in place, so that
            the user's own references and names stay true.
        """
        return module

    @behaviour
    def forward_context(self) -> AbstractContextManager[Any] | None:
        """Give a new context for one run of ``forward``; ``None`` where none is needed, always or never."""
        return None

    @behaviour
    def wrap_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Transform an optimizer after the strategy did."""
        return optimizer

    @behaviour
    def wrap_dataloader(self, dataloader: Any) -> Any:
        """Transform a data loader before the core wraps it."""
        return dataloader

    @behaviour
    def state_dict(self) -> dict[str, Any]:
        """Give what the wrapper itself must save to continue, as plain values and tensors.

        It travels with every checkpoint that ``fabric.save`` writes; called on every rank, and rank 0's is kept.
        """
        return {}

    @behaviour
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave; called on every rank."""
