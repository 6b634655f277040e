"""Small right strategies: alone, averaging, through a route, sharding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts import (
    Collectives,
    PrecisionPolicy,
    ProcessGroup,
    SingleProcess,
    Strategy,
    StrategyCapabilities,
    World,
)
from fabric_core.errors import MisuseError

__all__ = ["Alone", "Averaging", "Routed", "Sharding"]


class Alone(Strategy):
    """One process: the contract's defaults."""

    capabilities = StrategyCapabilities(max_world_size=1)

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """There are no other processes."""
        return SingleProcess()


class Averaging(Strategy):
    """Whole models, whose gradients are averaged after each backward pass, one by one, in the open.

    Its steps lie in methods of their own, so that a mutant changes one of them.
    """

    capabilities = StrategyCapabilities(distributed=True, no_backward_sync=True, requires_strategy_backward=True)

    group_class: ClassVar[type[ProcessGroup]] = ProcessGroup
    """Makes the collectives; a mutant makes wrong ones."""

    _world: World | None = None
    _modules: tuple[nn.Module, ...] = ()
    _skipping: frozenset[int] = frozenset()

    @property
    def world(self) -> World:
        """This process among the others."""
        if self._world is None:
            raise MisuseError("not connected")
        return self._world

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Make a process group, or use the one that there is."""
        self._world = world
        return self.group_class(world)

    def teardown(self) -> None:
        """Forget the models."""
        self._world, self._modules, self._skipping = None, (), frozenset()

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Give every rank the values of rank 0, and remember whose gradients to average."""
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)
        self._modules = (*self._modules, module)
        return module

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Run the backward pass, then average."""
        loss.backward(**arguments)
        for one in self._modules:
            if self.averages(one):
                self.average([parameter for parameter in one.parameters() if parameter.requires_grad])

    def averages(self, module: nn.Module) -> bool:
        """Say whether this backward pass averages a module's gradients."""
        return id(module) not in self._skipping

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients; a rank that has none counts as zero, where another one has."""
        there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        for parameter, any_rank in zip(parameters, there.tolist(), strict=True):
            if any_rank:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world.world_size

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Leave a module out of the averaging."""
        before = self._skipping
        if enabled:
            self._skipping = before | {id(module)}
        try:
            yield
        finally:
            self._skipping = before


class Routed(Averaging):
    """As ``Averaging``, but only for what passes through the module that it returns."""

    capabilities = StrategyCapabilities(
        distributed=True, no_backward_sync=True, requires_strategy_backward=True, intercepts_forward=True
    )

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Watch what passes."""
        super().setup_module(module)
        gate = _Gate(module)
        self._modules = (*self._modules[:-1], gate)
        return gate

    def averages(self, module: nn.Module) -> bool:
        """Average what has passed since the last time."""
        if not isinstance(module, _Gate):
            raise AssertionError("only gates are remembered")  # noqa: TRY004 - a broken invariant
        passed, module.passed = module.passed, False
        module.averaged = passed and super().averages(module)
        return module.averaged

    def gradients_averaged(self, module: nn.Module, complete: bool) -> bool:
        """Say whether the last backward pass averaged a module's gradients."""
        known = any(module is one for one in self._modules)
        return known and isinstance(module, _Gate) and module.averaged


class _Gate(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.passed = False
        self.averaged = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passed = True
        return self.module(*args, **kwargs)


class Sharding(Averaging):
    """Parameters lie in shards, by PyTorch's own ``fully_shard``."""

    capabilities = StrategyCapabilities(
        distributed=True, sharded=True, intercepts_forward=True, loss_scaling=False, no_backward_sync=True
    )

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shard in place."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)
        fully_shard(module, mesh=init_device_mesh(self.world.device.type, (self.world.world_size,)))
        self._modules = (*self._modules, module)
        return module

    def kept_apart(self, parameters: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Gather whole parameters, and give those whose gradients were not reduced into the shards that are named."""
        named = {id(one) for one in parameters}
        for module in self._modules:
            sharded: Any = module
            sharded.reshard()
            shards = list(module.parameters())
            sharded.unshard()
            for shard, one in zip(shards, list(module.parameters()), strict=True):
                if id(shard) in named and one is not shard and one.grad is not None:
                    yield one
            sharded.reshard()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step, unless gradients were not reduced."""
        held = [one for group in optimizer.param_groups for one in group["params"]]

        def check(result: Any = None) -> Any:
            if list(self.kept_apart(held)):
                raise MisuseError("the gradients are not synchronized")
            return result

        if closure is None:
            check()
            return super().optimizer_step(optimizer, None)
        return super().optimizer_step(optimizer, lambda: check(closure()))

    def gradients_cleared(self, parameters: Sequence[torch.Tensor]) -> None:
        """Clear what was not reduced too."""
        for one in self.kept_apart(parameters):
            one.grad = None

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Run the backward pass, which synchronizes by itself; it knows no shards by name."""
        if arguments.get("inputs") is not None:
            raise MisuseError("shards can't be named as inputs of a backward pass")
        loss.backward(**arguments)

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Turn the reduction of gradients off."""
        sharded: Any = module
        outermost = enabled and id(module) not in self._skipping
        with super().no_backward_sync(module, enabled):
            if outermost:
                sharded.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                if outermost:
                    sharded.set_requires_gradient_sync(True)

    def clip_grad_norm(
        self, parameters: Sequence[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        """Give the whole model's norm, whole."""
        norm: Any = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
        whole: torch.Tensor = norm.full_tensor()
        return whole

    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        """Gather on rank 0, or give the shards."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        if not full:
            return module.state_dict()
        return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def load_module_state(self, module: nn.Module, state: Mapping[str, Any], full: bool, strict: bool) -> None:
        """Divide again, or load the shards."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        own = module.state_dict()
        for name, value in state.items():
            if name in own and own[name].shape != value.shape:
                raise RuntimeError(f"{name} has the shape {tuple(value.shape)}, and needs {tuple(own[name].shape)}")
        if not full:
            module.load_state_dict(state, strict=strict)
            return
        missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        if strict and (missing or unexpected):
            raise RuntimeError(f"missing {missing}, unexpected {unexpected}")
        known = {name: value for name, value in state.items() if name in own}
        set_model_state_dict(module, known, options=StateDictOptions(full_state_dict=True, strict=False))

    def optimizer_state(self, optimizer: Optimizer, full: bool) -> dict[str, Any]:
        """Gather on every rank, or give the shards."""
        state = optimizer.state_dict()
        if full:
            state["state"] = {
                index: {name: _whole(value) for name, value in entry.items()} for index, entry in state["state"].items()
            }
        return state

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any], full: bool) -> None:
        """Divide again, or load the shards."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        loaded = dict(state)
        if full:
            parameters: list[Any] = [one for group in optimizer.param_groups for one in group["params"]]
            loaded["state"] = {
                index: {
                    name: distribute_tensor(value, parameters[index].device_mesh, parameters[index].placements)
                    if isinstance(parameters[index], DTensor)
                    and isinstance(value, torch.Tensor)
                    and value.shape == parameters[index].shape
                    else value
                    for name, value in entry.items()
                }
                for index, entry in state["state"].items()
            }
        optimizer.load_state_dict(loaded)


def _whole(value: Any) -> Any:
    whole = getattr(value, "full_tensor", None)
    return value if whole is None else whole().cpu()
