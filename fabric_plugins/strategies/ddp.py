"""Distributed data parallelism: every rank holds the whole model, gradients are averaged."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Literal

import torch.distributed as dist
from torch import nn

from fabric_core.contracts import Preset, StrategyCapabilities
from fabric_core.errors import SetupError
from fabric_plugins.strategies._distributed import DistributedOptions, DistributedStrategy

__all__ = ["DDP_FIND_UNUSED_PARAMETERS_TRUE", "DDP_NOTEBOOK", "DDP_SPAWN", "DDPOptions", "DDPStrategy"]

_WITHOUT_BFLOAT16: Final = frozenset({"gloo", "mpi"})
"""The backends that PyTorch's bfloat16 compression is not supported on, whatever else PyTorch was built with."""


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
    ddp_comm_hook: Literal["none", "fp16", "bf16", "powersgd"] = "none"
    """How gradients travel: as they are, in 16 bits, or as a product of small matrices (PowerSGD, as PyTorch sets
    it up: after 1,000 ordinary steps)."""


class DDPStrategy(DistributedStrategy):
    """Every rank holds the whole model and reads a part of the data; gradients are averaged during ``backward``."""

    Options = DDPOptions
    options: DDPOptions
    capabilities = StrategyCapabilities(
        distributed=True,
        intercepts_forward=True,
        no_backward_sync=True,
    )

    def __init__(self, options: DDPOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._wrapped: Any = None

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Wrap a module; one without trainable parameters starts with rank 0's values, and is averaged no more."""
        from fabric_plugins.strategies._replicated import Frozen, Known, Replicated

        if not any(parameter.requires_grad for parameter in module.parameters()):
            self._start_as_rank_zero(module)
            return Frozen(module)
        if self._wrapped is None:
            self._wrapped = Known()
        device = self.world.device
        wrapped = Replicated(
            module,
            device_ids=None if device.index is None else [device.index],
            process_group=self._group.group,
            find_unused_parameters=self.options.find_unused_parameters,
            static_graph=self.options.static_graph,
            gradient_as_bucket_view=self.options.gradient_as_bucket_view,
            bucket_cap_mb=self.options.bucket_cap_mb,
        )
        wrapped.know(self._wrapped)
        self._register_hook(wrapped)
        return wrapped

    def _register_hook(self, wrapped: Any) -> None:
        name = self.options.ddp_comm_hook
        if name == "none":
            return
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        state: Any = powerSGD_hook.PowerSGDState(self._group.group) if name == "powersgd" else self._group.group
        hook = {
            "fp16": default_hooks.fp16_compress_hook,
            "bf16": default_hooks.bf16_compress_hook,
            "powersgd": powerSGD_hook.powerSGD_hook,
        }[name]
        try:
            _check_backend(name, self.world.device.type)
            wrapped.register_comm_hook(state, hook)
        except (RuntimeError, TypeError, ValueError) as error:
            raise SetupError(
                f"the communication hook {name!r} can't be used here: {error}",
                where="options of the strategy DDPStrategy",
                got=f"ddp_comm_hook={name!r} with the backend {self.world.backend}",
                instead='ddp_comm_hook="none", or a backend that has what it needs',
            ) from error

    def teardown(self) -> None:
        """Take DDP's hooks off the models, then leave.

        Its reducer must not be the last owner of the process group: it would end the group's threads while it holds
        the interpreter's lock, which they may wait for.
        """
        for wrapped in self._wrapped or ():
            wrapped.leave()
        self._wrapped = None
        super().teardown()

    def gradients_averaged(self, module: nn.Module, complete: bool) -> bool:
        """Say whether DDP's reduction came to its end; it waits for every parameter that it takes for used."""
        averaged: bool = getattr(module, "averaged", _always)(complete)
        return averaged

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """Skip gradient synchronization inside the context."""
        return _unsynchronised(module, enabled=enabled)


def _check_backend(hook: str, device_type: str) -> None:
    """Ask the process group that gradients will travel through; PyTorch asks what it was built with.

    A build with NCCL lets the hook pass on a process group of gloo too.

    Raises:
        ValueError: PyTorch does not support the hook with its backend.
    """
    if hook != "bf16":
        return
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    backend = backends.get(device_type)
    if backend in _WITHOUT_BFLOAT16:
        raise ValueError(f"gradients on {device_type} travel by {backend}, with which PyTorch does not support it")


def _always(_complete: bool) -> bool:
    return True


@contextmanager
def _unsynchronised(module: Any, *, enabled: bool) -> Iterator[None]:
    if not (enabled and hasattr(module, "no_sync")):
        yield
        return
    with module.no_sync():
        yield


DDP_FIND_UNUSED_PARAMETERS_TRUE: Final = Preset.of(DDPStrategy, find_unused_parameters=True)
"""The alias ``ddp_find_unused_parameters_true``."""

DDP_NOTEBOOK: Final = Preset.of(DDPStrategy, start_method="fork")
"""The alias ``ddp_notebook``."""

DDP_SPAWN: Final = Preset.of(DDPStrategy, start_method="spawn")
"""The alias ``ddp_spawn``."""

DDP_FORK: Final = Preset.of(DDPStrategy, start_method="fork")
"""The alias ``ddp_fork``."""
