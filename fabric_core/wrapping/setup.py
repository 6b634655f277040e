"""Setting up: models, optimizers and loaders pass through precision, device, wrappers and strategy, and are wrapped."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary, finalize

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from fabric_core._torch import has_hooks
from fabric_core.collectives import World
from fabric_core.contracts import Precision, Strategy, Wrapper
from fabric_core.errors import MisuseTypeError, SetupError
from fabric_core.wrapping.added import Added
from fabric_core.wrapping.backward_guard import BackwardPass, backward_guard
from fabric_core.wrapping.checks import (
    check_counts,
    check_given,
    check_hooks,
    check_loader,
    check_model,
    check_optimizer,
    check_same,
    check_shared,
    check_trains,
    check_types,
)
from fabric_core.wrapping.compiled import compile_again, uncompiled
from fabric_core.wrapping.dataloader import FabricDataLoader
from fabric_core.wrapping.dividing import seed_apart, shard
from fabric_core.wrapping.forward import Around, Route
from fabric_core.wrapping.gradient_sync import gradient_sync
from fabric_core.wrapping.joining import joined
from fabric_core.wrapping.module import FabricModule, first_device, strategy_module
from fabric_core.wrapping.optimizer import FabricOptimizer, wrap_optimizer
from fabric_core.wrapping.step_guard import StepGuard

__all__ = ["Setup", "check_set_up"]


class Setup:
    """Sets up for one ``Fabric``, and knows what was set up.

    Args:
        strategy: The bound strategy.
        precision: The bound precision.
        wrappers: The bound wrappers, in the order in which they act.
        world_size: The number of processes.
        act: What a call of an optimizer's ``step`` goes through first, if anything.
    """

    def __init__(
        self,
        strategy: Strategy,
        precision: Precision,
        wrappers: Sequence[Wrapper],
        world_size: int,
        act: Callable[[Any, Callable[[], Any] | None], Any] | None = None,
    ) -> None:
        self._strategy = strategy
        self._precision = precision
        self._wrappers = wrappers
        self._world_size = world_size
        self._act = act
        # Weak: what was set up dies with its last user, and an old parameter once its optimizer has the new one.
        self._set_up: WeakSet[Any] = WeakSet()
        self._modules: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()  # in the same order on every rank
        self._models: WeakValueDictionary[int, FabricModule] = WeakValueDictionary()
        self._numbers = itertools.count()
        self._replaced = WeakTensorKeyDictionary()
        self._optimizers: WeakKeyDictionary[Optimizer, None] = WeakKeyDictionary()  # in the same order, too
        # What watches over gradients and steps; where nothing has to, nothing does.
        self._owner = object()
        self._guard = backward_guard(strategy, precision, self._owner)
        self._sync = gradient_sync(strategy, world_size, self._owner)
        sharded = self._set_up if strategy.capabilities.sharded else None
        scaled = self._guard if precision.policy.loss_scaling else None
        needed = self._sync is not None or scaled is not None or sharded is not None
        cleared = None if sharded is None else strategy.gradients_cleared
        divides = self._sync is not None or (sharded is not None and world_size > 1)
        self._added = Added() if divides else None
        self._steps = StepGuard(self._sync, scaled, sharded, self._added, cleared) if needed else None

    @property
    def models(self) -> list[FabricModule]:
        """The models that were set up and are still in use, in that order."""
        return list(self._models.values())

    def module(
        self, module: Any, optimizers: Sequence[Optimizer], world: World, *, move: bool
    ) -> tuple[FabricModule, list[FabricOptimizer]]:
        """Make a model ready, and the optimizers that are given with it.

        Raises:
            SetupError: Something was set up before, is no model or optimizer, or can't be set up so.
        """
        for optimizer in optimizers:
            check_optimizer(optimizer, self._set_up)
            if isinstance(module, nn.Module):
                check_trains(optimizer, [module, *self._set_up], self._replaced)
        declared = self._strategy.capabilities
        check_counts(self._strategy, len(self._models), len(optimizers))
        given, module = module, uncompiled(module)
        check_model(module, self._set_up, move=move, placed_later=declared.handles_device_placement)
        before = dict(module.named_parameters(remove_duplicate=False))
        original = module
        module = self._prepared(module, world.device if move and not declared.handles_device_placement else None)
        check_types(self._strategy, module)
        outer = Route(module) if declared.intercepts_forward else module
        ready: list[Optimizer] = []
        if declared.joint_setup:
            inner, ready = self._strategy.setup_jointly(outer, optimizers)
        else:
            inner = self._strategy.setup_module(outer)
        if isinstance(outer, Route):
            module = uncompiled(outer.module)  # a strategy may put another one into the route
        called = self._finished(inner)
        if given is not module and uncompiled(given) is not given:
            called = compile_again(given, called)
        replaced = self._replaced_in(module, before)
        wrapped = FabricModule(
            module,
            called,
            inner=inner,
            routed=declared.intercepts_forward,
            around=self._around(),
            device=world.device if move else first_device(module) or world.device,
        )
        self._set_up.update((original, module))
        self._modules[module] = None
        self._models[next(self._numbers)] = wrapped
        for wrapper in self._wrappers:
            wrapper.after_setup(module, replaced)
        self._watch_steps()
        if not declared.joint_setup:
            ready = [self._strategy.setup_optimizer(optimizer, self._replaced) for optimizer in optimizers]
        return wrapped, [self._wrapped(one, made) for one, made in zip(optimizers, ready, strict=True)]

    def _replaced_in(self, module: nn.Module, before: Mapping[str, torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
        """Give what the strategy put in the place of a model's parameters, also to the optimizers that are known.

        Raises:
            SetupError: Hooks on parameters would get lost, or what the model shares came apart.
        """
        after = dict(module.named_parameters(remove_duplicate=False))
        names = [name for name, old in before.items() if after[name] is not old]
        check_shared(before, after)
        check_hooks([name for name in names if has_hooks(before[name])])
        replaced: dict[torch.Tensor, torch.Tensor] = {before[name]: after[name] for name in names}
        self._replaced.update(replaced)
        for optimizer in self._optimizers:
            # One that was set up before its model holds parameters that are trained no more.
            self._strategy.setup_optimizer(optimizer, self._replaced)
        if self._added is not None:
            self._added.know(module)
        return replaced

    def _prepared(self, module: nn.Module, device: torch.device | None) -> nn.Module:
        """Convert and move a module, and let wrappers transform it, before the strategy has it."""
        module = self._precision.convert_module(module)
        if device is not None:
            module = module.to(device)
        for wrapper in self._stage("before_strategy"):
            check_same(wrapper.wrap_module(module), module, wrapper)
        return module

    def _finished(self, inner: nn.Module) -> nn.Module:
        """Let wrappers transform what the strategy made of a module."""
        if self._sync is not None:
            self._sync.made(inner)
        for wrapper in self._stage("after_strategy"):
            inner = wrapper.wrap_module(inner)
        return inner

    def _around(self) -> Around:
        policy = self._precision.policy
        carries = self._strategy.capabilities.applies_mixed_precision and policy.autocast
        return Around(
            precision=self._precision,
            # Inputs that stay as they are meet parameters of the computing type: only autocast can compute with both.
            carried=carries and policy.input_dtype is not None,
            wrappers=tuple(self._wrappers),
            guard=self._guard,
            sync=self._sync,
            steps=self._steps,
        )

    def _stage(self, stage: str) -> Iterator[Wrapper]:
        return (wrapper for wrapper in self._wrappers if wrapper.capabilities.stage == stage)

    def optimizers(self, optimizers: Sequence[Optimizer]) -> list[FabricOptimizer]:
        """Make optimizers ready that belong to models which are, or will be, set up elsewhere.

        Raises:
            SetupError: One was set up before, or is none, or the strategy needs it together with its model.
        """
        if self._strategy.capabilities.joint_setup:
            raise SetupError(
                f"{type(self._strategy).__name__} sets an optimizer up together with its model",
                where="fabric.setup_optimizers",
                instead="fabric.setup(model, optimizer)",
            )
        check_given(optimizers, "optimizer")
        for optimizer in optimizers:
            check_optimizer(optimizer, self._set_up)
        ready = [self._strategy.setup_optimizer(optimizer, self._replaced) for optimizer in optimizers]
        return [self._wrapped(one, made) for one, made in zip(optimizers, ready, strict=True)]

    def _wrapped(self, optimizer: Optimizer, ready: Optimizer) -> FabricOptimizer:
        self._optimizers[ready] = None
        held = {id(one) for group in ready.param_groups for one in group["params"]}
        modules = [one for one in self._modules if any(id(each) in held for each in one.parameters())]
        for wrapper in self._wrappers:
            ready = wrapper.wrap_optimizer(ready, modules)
        self._set_up.add(optimizer)
        if self._guard is not None:
            self._guard.watch_optimizer(ready)
        self._watch_steps()
        return wrap_optimizer(ready, self._strategy, self._precision, self._steps, self._wrappers, self._act)

    def dataloader(self, given: Any, device: torch.device | None, *, divide: bool, repeat: bool) -> FabricDataLoader:
        """Make a loader ready.

        Args:
            given: The loader.
            device: Where its batches go; ``None`` leaves them.
            divide: Let each rank read its own part.
            repeat: Let all parts be equally long, some samples repeated where need be.

        Raises:
            SetupError: It was set up before, or keeps its samplers where they can't be replaced.
        """
        check_loader(given)
        loader, index, count = given, *self._strategy.data_shard()
        loader, stream = seed_apart(loader, index, count)
        if divide:
            loader = shard(loader, index, count, lambda seed: self._strategy.broadcast(seed, 0), repeat=repeat)
        for wrapper in self._wrappers:
            loader = wrapper.wrap_dataloader(loader)
        return FabricDataLoader(loader, device, given, stream)

    def backward_pass(self) -> AbstractContextManager[Any]:
        """Give the context of one call of ``fabric.backward``."""
        return nullcontext() if self._guard is None and self._sync is None else BackwardPass(self._owner)

    def reduced(self, result: Any) -> None:
        """Take note of what the script reduced over all ranks."""
        if self._sync is not None and self._sync.noted:
            self._sync.reduced(result)

    def called(self, model: FabricModule | None) -> nn.Module | None:
        """Give what the strategy made of a model; without one, of the only one that is set up."""
        if model is not None:
            return strategy_module(check_set_up(model, "fabric.backward(model=)"))
        models = self._models.valuerefs()  # going through the values takes ten times as long
        only = models[0]() if len(models) == 1 else None
        return None if only is None else strategy_module(only)

    def no_backward_sync(self, module: Any, *, enabled: bool) -> AbstractContextManager[Any]:
        """Give the context that skips gradient synchronization.

        Raises:
            MisuseTypeError: The model was not set up.
        """
        module = check_set_up(module, "fabric.no_backward_sync")
        inner = strategy_module(module)
        context = self._strategy.no_backward_sync(inner, enabled)
        if self._sync is None or not enabled or not self._strategy.capabilities.no_backward_sync:
            return context
        return self._sync.watch(module.module, inner).skipped(context)

    def join(self, models: Sequence[Any], *, divide_by_initial_world_size: bool) -> AbstractContextManager[None]:
        """Give the context in which ranks may have different numbers of batches.

        Raises:
            MisuseTypeError: A model was not set up.
            RequestError: There is none.
        """
        check_given(models, "model")
        found = [check_set_up(model, "fabric.join") for model in models]
        if self._world_size == 1:
            return nullcontext()
        trained = {id(one) for model in found for one in model.parameters()}
        optimizers = [
            optimizer
            for optimizer in self._optimizers
            if any(id(one) in trained for group in optimizer.param_groups for one in group["params"])
        ]
        return joined(
            [strategy_module(model) for model in found],
            optimizers,
            self._strategy,
            self._precision,
            divide_by_initial_world_size=divide_by_initial_world_size,
        )

    def _watch_steps(self) -> None:
        if self._steps is not None and not self._steps.opened:
            # It ends with this object, also where nobody tears the Fabric down.
            finalize(self, self._steps.open()).atexit = False

    def close(self) -> None:
        """Take off every hook."""
        for watching in (self._steps, self._guard, self._sync):
            if watching is not None:
                watching.close()


def check_set_up(model: Any, where: str) -> FabricModule:
    """Give a model that was set up, also out of ``torch.compile``.

    Raises:
        MisuseTypeError: It was not set up.
    """
    model = uncompiled(model)
    if not isinstance(model, FabricModule):
        raise MisuseTypeError(
            "the model was not set up", where=where, got=type(model).__name__, instead="what fabric.setup returned"
        )
    return model
