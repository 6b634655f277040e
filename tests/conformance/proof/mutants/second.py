"""Wrong plugins for the rules of the kit's second edition."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from fabric_core.collectives import Collectives, ProcessGroup
from fabric_core.conformance.references import (
    Averaging,
    Full,
    OneFile,
    Remembering,
    Routed,
    Scaled,
    Sharding,
    Surroundings,
)
from fabric_core.contracts import MemoryEstimate, PrecisionPolicy, ProcessInfo, World
from fabric_plugins.strategies import FSDPStrategy
from proof.mutants import Mutants

MUTANTS = Mutants()
mutant = MUTANTS.mutant


# Strategies


@mutant("gives zeros for gradients that no rank has", "STR-337", "STR-338")
class Zeroing(Averaging):
    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        super().average(parameters)


@mutant("ends the outer context with the inner one", "STR-365")
class Unnested(Averaging):
    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        if enabled:
            self._skipping |= {id(module)}
        try:
            yield
        finally:
            self._skipping -= {id(module)}


@mutant("keeps its own learning rate as it loads", "STR-381")
class Stubborn(Averaging):
    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any], full: bool) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        super().load_optimizer_state(optimizer, state, full)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


@mutant("takes the groups out of the state that it loads", "STR-382")
class Devouring(Averaging):
    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any], full: bool) -> None:
        super().load_optimizer_state(optimizer, state, full)
        if isinstance(state, dict):
            state.pop("param_groups")


class _Default(ProcessGroup):
    @property
    def group(self) -> Any:
        return dist.group.WORLD if self._group is None else self._group


@mutant("goes on through the default group once it was closed", "STR-401")
class Lingering(Averaging):
    group_class = _Default


class _FromTheFirst(ProcessGroup):
    def broadcast_tensors(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        super().broadcast_tensors(tensors, 0)


@mutant("fills tensors with the first rank's, whichever is named", "STR-402")
class Favouring(Averaging):
    group_class = _FromTheFirst


class _Attached(ProcessGroup):
    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        result = super().all_reduce(tensor, group, reduce_op)
        return result + 0 * tensor if tensor.requires_grad else result


@mutant("lets what it reduced hold the graph", "STR-403")
class Holding(Averaging):
    group_class = _Attached


@mutant("scales what it has filled", "STR-400")
class Inflating(FSDPStrategy):
    def setup_module(self, module: nn.Module) -> nn.Module:
        empty = any(one.is_meta for one in module.parameters())
        made = super().setup_module(module)
        for one in module.parameters() if empty else ():
            one.detach().mul_(2)
        return made


@mutant("reduces gradients into shards inside no_backward_sync", "STR-306")
class Eager(Sharding):
    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        yield


@mutant("loads own parts without asking which keys there are", "STR-375", "STR-376")
class Unasked(Averaging):
    def load_module_state(self, module: nn.Module, state: Mapping[str, Any], full: bool, strict: bool) -> None:
        super().load_module_state(module, state, full, strict and full)


@mutant("waits for ever, whatever the world says", "STR-367")
class Patient(Averaging):
    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        self._world = world
        return ProcessGroup(world, timeout=timedelta(minutes=30))


@mutant("clips whatever it has set up", "STR-345")
class Sweeping(Averaging):
    def clip_grad_norm(
        self, parameters: Sequence[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        every = [parameter for module in self._modules for parameter in module.parameters()]
        return super().clip_grad_norm(every, max_norm, norm_type, error_if_nonfinite)


# Steps on gradients that each rank has of its own


class _Sink(nn.Module):
    """Says that something passed where a gradient comes back through what it gave."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.passed = False
        self.averaged = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.module(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.register_hook(self.mark)
        return result

    def mark(self, _gradient: torch.Tensor) -> None:
        self.passed = True


@mutant("averages what comes back through its outputs, and says that it averaged the rest too", "STR-368")
class Claiming(Routed):
    def setup_module(self, module: nn.Module) -> nn.Module:
        super().setup_module(module)
        sink = _Sink(module)
        self._modules = (*self._modules[:-1], sink)
        return sink

    def averages(self, module: nn.Module) -> bool:
        sink: Any = module
        passed, sink.passed = sink.passed, False
        return passed and Averaging.averages(self, module)

    def gradients_averaged(self, module: nn.Module, complete: bool) -> bool:
        return True


@mutant("steps on shards whatever was reduced", "STR-366", "STR-368", "STR-369", "STR-383")
class Trusting(Sharding):
    def kept_apart(self, parameters: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        return iter(())


@mutant("doesn't look again after a closure", "STR-366")
class Glancing(Sharding):
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        step = super().optimizer_step if closure is None else Averaging.optimizer_step.__get__(self)
        return step(optimizer, closure)


@mutant("looks at the model alone that was set up last", "STR-369")
class Narrow(Sharding):
    def kept_apart(self, parameters: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        every, self._modules = self._modules, self._modules[-1:]
        try:
            yield from super().kept_apart(parameters)
        finally:
            self._modules = every


@mutant("adds gradients that were cleared to the next", "STR-383")
class Keeping(Sharding):
    def gradients_cleared(self, parameters: Sequence[torch.Tensor]) -> None:
        pass


@mutant("says that ranks divide what each of them holds whole", "STR-399")
class Hopeful(Averaging):
    def estimate_memory(
        self, info: ProcessInfo, policy: PrecisionPolicy, module: nn.Module, optimizer: Optimizer
    ) -> MemoryEstimate:
        return MemoryEstimate.of(module, optimizer, lambda one: one.nbytes // info.world_size)


@mutant("says that ranks hold whole what they divide", "STR-399")
class Undivided(Sharding):
    def estimate_memory(
        self, info: ProcessInfo, policy: PrecisionPolicy, module: nn.Module, optimizer: Optimizer
    ) -> MemoryEstimate:
        return MemoryEstimate.of(module, optimizer)


@mutant("leaves the optimizer's state out of what ranks will hold", "STR-399")
class Stateless(Averaging):
    def estimate_memory(
        self, info: ProcessInfo, policy: PrecisionPolicy, module: nn.Module, optimizer: Optimizer
    ) -> MemoryEstimate:
        return replace(super().estimate_memory(info, policy, module, optimizer), optimizer=0)


# Precisions


@mutant("takes out of the state what it loads", "PRE-237")
class Emptying(Scaled):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if isinstance(state, dict):
            state.clear()


@mutant("sets the default type when a context is made", "PRE-238")
class Hurrying(Full):
    def init_context(self) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return _back(before)


@contextmanager
def _back(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    yield


@mutant("forgets how often it stepped as it is restored", "PRE-239")
class Forgetting(Scaled):
    def __init__(self, *arguments: Any, **given: Any) -> None:
        super().__init__(*arguments, **given)
        self.good = 0

    def update(self) -> None:
        self.good = 0 if self.overflown else self.good + 1
        super().update()
        if self.good == 40:
            self.scale, self.good = self.scale * 2, 0


@mutant("decides alone whether to step", "PRE-240")
class Selfish(Scaled):
    def agreed(self, finite: bool) -> bool:
        return finite


# Checkpoints, loggers, launchers


@mutant("writes 64 bits as 32, in the tree that it is given", "CHK-601", "CHK-611")
class Shrinking(OneFile):
    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        model = tree.get("model")
        if isinstance(model, dict):
            model.update({name: one.float() for name, one in model.items() if one.dtype == torch.float64})
        super().write(path, tree)


@mutant("takes equal tensors for one", "CHK-612")
class Uniting(OneFile):
    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        tree = super().read(path, into)
        model = tree.get("model")
        if not isinstance(model, dict):
            return tree
        united = {
            name: next(other for other in model.values() if other.dtype == one.dtype and torch.equal(other, one))
            for name, one in model.items()
        }
        return {**tree, "model": united}


@mutant("takes settings apart as it logs them", "LOG-704")
class Dismantling(Remembering):
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        if isinstance(params, dict):
            params.pop("nested", None)


@mutant("takes any variable for its own", "LAU-510")
class Credulous(Surroundings):
    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        if "PMI_RANK" in environment:
            return ProcessInfo(global_rank=int(environment["PMI_RANK"]))
        return super().detect(environment)


class _Unheard(ProcessGroup):
    """Finds its methods past the instance, where extensions put theirs."""

    def __getattribute__(self, name: str) -> Any:
        found = inspect.getattr_static(type(self), name, None)
        return found.__get__(self) if isinstance(found, FunctionType) else super().__getattribute__(name)


@mutant("gives collectives that no extension can go round", "STR-404")
class Unheard(Averaging):
    group_class = _Unheard
