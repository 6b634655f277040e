"""The contract of a wrapper: transforms what is set up, beside the strategy."""

from abc import ABC
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts._spec import Plugin
from fabric_core.contracts.capabilities import WrapperCapabilities
from fabric_core.markers import behaviour

__all__ = ["Wrapper"]


class Wrapper(Plugin, ABC):
    """Transforms a module before or after the strategy wraps it, gives it a context, or wraps optimizers and loaders.

    There may be any number; they act in the user's order, which must agree with the order that they declare. One
    instance serves all models, optimizers and loaders of its ``Fabric``, so what it keeps of one belongs into a
    mapping, such as a ``WeakKeyDictionary``. A script reaches it as ``fabric.wrappers["name"]``.
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
    def after_setup(self, module: nn.Module, replaced: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Called once a model is set up, before its optimizers are wrapped.

        Args:
            module: The user's module, with the parameters that are trained.
            replaced: For each of the user's parameters that the strategy replaced, the one that took its place.
        """

    @behaviour
    def forward_context(self) -> AbstractContextManager[Any] | None:
        """Give a new context for one run of ``forward``; ``None`` where none is needed, always or never."""
        return None

    @behaviour
    def wrap_optimizer(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Optimizer:
        """Transform an optimizer after the strategy did.

        Args:
            optimizer: The optimizer, which holds the parameters that are trained.
            modules: The user's modules that it trains, of those that are set up by now; none where an optimizer is set
                up before its model.

        Returns:
            The optimizer to use in its place.
        """
        return optimizer

    @behaviour
    def after_step(self, optimizer: Optimizer) -> None:
        """Called after each step that was made; not where the precision skipped it.

        Args:
            optimizer: What the last ``wrap_optimizer`` returned.
        """

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
