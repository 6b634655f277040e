"""Distributed data parallelism: every rank holds the whole model, gradients are averaged."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn

from fabric_core.contracts import StrategyCapabilities
from fabric_plugins.strategies._distributed import DistributedOptions, DistributedStrategy

__all__ = ["DDPOptions", "DDPStrategy"]


class DDPOptions(DistributedOptions):
    """The options of the strategy ``ddp``; ``torch.nn.parallel.DistributedDataParallel``'s under their own names."""

    find_unused_parameters: bool = False
    """Look for parameters that a forward pass doesn't use; without it, one is an error."""
    static_graph: bool = False
    """The set of used parameters never changes."""
    gradient_as_bucket_view: bool = True
    """Gradients are views into the buckets that are reduced, which saves one copy of them."""
    bucket_cap_mb: float | None = None
    """The size of a bucket in MiB."""


class DDPStrategy(DistributedStrategy):
    """Every rank holds the whole model and reads a part of the data; gradients are averaged during ``backward``."""

    Options = DDPOptions
    options: DDPOptions
    capabilities = StrategyCapabilities(
        distributed=True,
        wraps_forward=True,
        no_backward_sync=True,
        unused_parameters=False,
        priority=5,
    )

    def __init__(self, options: DDPOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._wrapped: WeakSet[Any] = WeakSet()

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Wrap a module; one without trainable parameters has nothing to average."""
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        from torch.nn.parallel import DistributedDataParallel

        device = self.world.device
        wrapped = DistributedDataParallel(
            module,
            device_ids=None if device.index is None else [device.index],
            find_unused_parameters=self.options.find_unused_parameters,
            static_graph=self.options.static_graph,
            gradient_as_bucket_view=self.options.gradient_as_bucket_view,
            bucket_cap_mb=self.options.bucket_cap_mb,
        )
        self._wrapped.add(wrapped)
        return wrapped

    def teardown(self) -> None:
        """Take DDP's hooks off the models, then leave.

        Its reducer must not be the last owner of the process group: it would end the group's threads while it holds
        the interpreter's lock, which they may wait for.
        """
        for wrapped in self._wrapped:
            del wrapped.reducer, wrapped.logger
        self._wrapped.clear()
        super().teardown()

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """Leave gradients apart inside the context."""
        return _unsynchronised(module, enabled=enabled)


@contextmanager
def _unsynchronised(module: Any, *, enabled: bool) -> Iterator[None]:
    if not (enabled and hasattr(module, "require_backward_grad_sync")):
        yield
        return
    with module.no_sync():
        yield
