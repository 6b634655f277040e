"""Distributed data parallelism: every rank holds the whole model, gradients are averaged."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Final, Literal

import torch.distributed as dist
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts import (
    Collectives,
    MemoryEstimate,
    PrecisionPolicy,
    Preset,
    ProcessGroup,
    ProcessInfo,
    StrategyCapabilities,
    World,
)
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
    broadcast_buffers: bool = True
    """Give every rank the buffers of rank 0 at the beginning of ``forward``."""
    gradient_as_bucket_view: bool = True
    """Gradients are views into the buckets that are reduced, which saves one copy of them."""
    bucket_cap_mb: float | None = None
    """The size of a bucket in MiB."""
    process_group: Any = Field(default=None, exclude=True)
    """A process group of ``torch.distributed`` over a part of the ranks, which models start alike in and gradients
    travel on; ``None`` is all ranks. Only its members set models up; every rank launches."""
    ddp_comm_hook: Literal["none", "fp16", "bf16", "powersgd"] = "none"
    """How gradients travel: as they are, in 16 bits, or as a product of small matrices (PowerSGD, as PyTorch sets
    it up: after 1,000 ordinary steps)."""


class DDPStrategy(DistributedStrategy):
    """Every rank holds the whole model and reads a part of the data; gradients are averaged during ``backward``."""

    Options = DDPOptions
    options: DDPOptions
    _members: ProcessGroup | None = None
    capabilities = StrategyCapabilities(
        distributed=True,
        intercepts_forward=True,
        no_backward_sync=True,
    )

    def __init__(self, options: DDPOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._wrapped: Any = None

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join all ranks; models may live on a part of them."""
        everybody = super().connect(world, policy)
        given = self.options.process_group
        if given is None:
            self._members = self._group
        elif dist.get_rank(given) >= 0:
            self._members = ProcessGroup(world, group=given)
        return everybody

    def estimate_memory(
        self, info: ProcessInfo, policy: PrecisionPolicy, module: nn.Module, optimizer: Optimizer
    ) -> MemoryEstimate:
        """Add the buckets: gradients are views into them, or copied there."""
        whole = MemoryEstimate.of(module, optimizer)
        if self.options.gradient_as_bucket_view:
            return replace(whole, gradients_stay=True)
        return replace(whole, in_flight=whole.gradients, in_flight_last=whole.gradients)

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Wrap a module; one without trainable parameters starts with rank 0's values, and is averaged no more.

        Raises:
            SetupError: This rank is no member of the process group that was given.
        """
        from fabric_plugins.strategies._replicated import Frozen, Known, Replicated

        members = self._members
        if members is None:
            raise SetupError(
                f"rank {self.world.global_rank} is no member of the process group that was given",
                where="options of the strategy DDPStrategy",
                got="process_group=a group of other ranks",
                instead="fabric.setup on the members alone, or a group with this rank",
            )
        if not any(parameter.requires_grad for parameter in module.parameters()):
            self._start_as_rank_zero(module, members)
            return Frozen(module)
        if self._wrapped is None:
            self._wrapped = Known()
        device = self.world.device
        buffers: dict[str, Any] = {}  # PyTorch warns of the argument, whatever its value
        if not self.options.broadcast_buffers:
            buffers = {"broadcast_buffers": False}
            members.broadcast_tensors([one.detach() for one in module.buffers()], 0)  # PyTorch leaves them
        wrapped = Replicated(
            module,
            device_ids=None if device.index is None else [device.index],
            process_group=members.group,
            find_unused_parameters=self.options.find_unused_parameters,
            static_graph=self.options.static_graph,
            **buffers,
            gradient_as_bucket_view=self.options.gradient_as_bucket_view,
            bucket_cap_mb=self.options.bucket_cap_mb,
        )
        wrapped.know(self._wrapped)
        self._register_hook(wrapped, members.group)
        return wrapped

    def _register_hook(self, wrapped: Any, group: Any) -> None:
        name = self.options.ddp_comm_hook
        if name == "none":
            return
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        state: Any = powerSGD_hook.PowerSGDState(group) if name == "powersgd" else group
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
        self._wrapped = self._members = None
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
