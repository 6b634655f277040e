"""The façade: everything a training script calls, in the order of a script's life."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Self
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from fabric_core.binding import owner_of
from fabric_core.choosing.candidates import assemble
from fabric_core.choosing.registry import register, registrations
from fabric_core.choosing.request import Request, fill, read_environment, read_file
from fabric_core.choosing.resolve import Plan, start_clash
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import (
    Accelerator,
    Checkpoint,
    Launcher,
    LaunchOrder,
    Logger,
    Precision,
    ProcessInfo,
    Strategy,
    World,
    Wrapper,
    map_tensors,
)
from fabric_core.errors import CheckpointError, LaunchError, MisuseError, RequestError, SetupError
from fabric_core.running import seeding
from fabric_core.running.checkpointing import (
    PRECISION,
    check_fits,
    check_named,
    collect,
    restore,
    restore_precision,
    template,
)
from fabric_core.running.failing import Failures
from fabric_core.running.launching import agree, check_connected, detect, environment, make_world
from fabric_core.wrapping import (
    Around,
    FabricDataLoader,
    FabricModule,
    FabricOptimizer,
    Route,
    backward_guard,
    check_counts,
    check_model,
    check_optimizer,
    check_same,
    check_trains,
    compile_again,
    first_device,
    is_wrapped,
    shard,
    strategy_module,
    to_device,
    uncompiled,
    unwrap,
    wrap_optimizer,
)

__all__ = ["Fabric"]

_BACKWARD: Final = ("gradient", "retain_graph", "create_graph", "inputs")
"""The arguments of ``torch.Tensor.backward``, in order."""
_TIMEOUT: Final = timedelta(minutes=30)


class Fabric:
    """Runs a plain PyTorch script on any hardware, with any strategy, in any precision.

    Args:
        accelerator: The hardware, by name; ``"auto"`` takes the best that is here.
        strategy: How processes train together, by name; ``"auto"`` takes what fits the number of devices.
        devices: A count, indices, or ``"auto"``; for each node.
        num_nodes: The number of machines.
        precision: The number types, by name.
        wrappers: What else transforms models, in order.
        plugins: Extensions, and plugins of the kinds ``precision``, ``launcher`` and ``checkpoint``: instances, text
            (``"launcher=name:option=value"``), or mappings with ``kind`` and ``name``.
        callbacks: Objects whose methods ``fabric.call`` calls.
        loggers: What takes metrics.

    Every plugin is a name, a name with options (``"name:option=value"``), a mapping, or an instance.
    What is left at its default is filled from the variables ``FABRIC_ACCELERATOR``, ``FABRIC_STRATEGY``,
    ``FABRIC_DEVICES``, ``FABRIC_NUM_NODES``, ``FABRIC_PRECISION``, ``FABRIC_WRAPPERS`` and ``FABRIC_LOGGERS``.

    Raises:
        RequestError: An argument can't be understood.
        PluginError: A plugin can't be had.
        PlanError: The choices don't fit together.
    """

    def __init__(
        self,
        *,
        accelerator: Any = "auto",
        strategy: Any = "auto",
        devices: Any = "auto",
        num_nodes: int = 1,
        precision: Any = None,
        wrappers: Any = None,
        plugins: Any = None,
        callbacks: Any = None,
        loggers: Any = None,
    ) -> None:
        code = {
            "accelerator": accelerator,
            "strategy": strategy,
            "devices": devices,
            "num_nodes": num_nodes,
            "precision": precision,
            "wrappers": wrappers,
            "plugins": plugins,
            "callbacks": callbacks,
            "loggers": loggers,
        }
        self._request = Request.of(**fill(code, read_environment(environment())))
        self._build()

    @classmethod
    def from_config(cls, path: str | Path, **arguments: Any) -> Self:
        """Make one from a configuration file.

        Args:
            path: A TOML or YAML file whose keys are the arguments of ``Fabric``, apart from ``callbacks``.
            arguments: Arguments that win over the file and over the variables ``FABRIC_*``.

        Raises:
            RequestError: The file can't be read or understood.
            NotInstalledError: It is YAML, and the package that reads YAML isn't installed.
        """
        return cls(**fill(arguments, read_environment(environment()), read_file(path)))

    def _build(self) -> None:
        own = set(vars(self))
        self._world: World | None = None
        self._collectives: Collectives = SingleProcess()
        parts = assemble(self._request, environment(), self._rank)
        self._plan = parts.plan
        self._accelerator = parts.accelerator
        self._strategy = parts.strategy
        self._precision = parts.precision
        self._wrappers = parts.wrappers
        self._launchers = parts.launchers
        self._checkpoints = parts.checkpoints
        self._loggers = parts.loggers
        self._hooks = parts.hooks
        self._launcher: Launcher | None = None
        self._failures: Failures | None = None
        self._guard = backward_guard(self._strategy, self._precision)
        # Weak: what was set up dies with its last user, and an old parameter once its optimizer has the new one.
        self._set_up: WeakSet[Any] = WeakSet()
        self._models: WeakSet[FabricModule] = WeakSet()
        self._replaced = WeakTensorKeyDictionary()
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._built = set(vars(self)) - own
        self._hooks.configured(plan=self._plan)

    # What was chosen

    @property
    def plan(self) -> Plan:
        """What was chosen for every kind, and why; ``print`` shows a table."""
        return self._plan

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator that was chosen."""
        return owner_of(self._accelerator)

    @property
    def strategy(self) -> Strategy:
        """The strategy that was chosen."""
        return owner_of(self._strategy)

    @property
    def precision(self) -> Precision:
        """The precision that was chosen."""
        return owner_of(self._precision)

    @property
    def loggers(self) -> list[Logger]:
        """The loggers."""
        return self._loggers

    @property
    def logger(self) -> Logger:
        """The first logger.

        Raises:
            MisuseError: There is none.
        """
        if not self._loggers:
            raise MisuseError("there is no logger", where="fabric.logger", instead="Fabric(loggers=...)")
        return self._loggers[0]

    # Who this process is

    @property
    def world(self) -> World:
        """Who this process is; a single process needs no ``launch``.

        Raises:
            MisuseError: There will be several processes, and they are not launched yet.
        """
        if self._world is None:
            if self._plan.world_size > 1 and detect(self._launchers) is None:
                raise MisuseError(
                    f"the {self._plan.world_size} processes are not launched yet",
                    where="this call needs them",
                    instead="call fabric.launch() right after Fabric(...)",
                )
            self.launch()
        if self._world is None:
            raise AssertionError("launching made no world")
        return self._world

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.world.device

    @property
    def global_rank(self) -> int:
        """This process among all, from 0."""
        return self.world.global_rank

    @property
    def local_rank(self) -> int:
        """This process among those of its node, from 0."""
        return self.world.local_rank

    @property
    def node_rank(self) -> int:
        """This node among all, from 0."""
        return self.world.node_rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self._plan.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.world.is_global_zero

    # Starting

    def launch(self, function: Callable[..., Any] | None = None, /, *args: Any, **kwargs: Any) -> Any:
        """Start the processes that the plan has, or join those that something else started.

        Without a function, each rank re-runs the command that was typed and comes back from here as itself; the process
        that the user started waits and exits with their exit code. With one device no process is started.

        Args:
            function: What to run in each rank instead; it is given this object of that rank, then the rest.
            args: The function's further positional arguments.
            kwargs: The function's keyword arguments.

        Returns:
            What the function returned on rank 0; without a function ``None``.

        Raises:
            LaunchError: The processes could not be started, or don't agree on the plan.
            RankFailedError: The function failed on a rank.
        """
        if self._world is None:
            found = detect(self._launchers)
            if found is not None and (found[2].world_size > 1 or self._plan.world_size > 1):
                self._join(found[1], found[2])
            elif self._plan.world_size > 1:
                return self._start(function, args, kwargs)
            else:
                self._join(None, ProcessInfo())
        return None if function is None else function(self, *args, **kwargs)

    def _start(self, function: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not self._launchers:
            raise SetupError("no launcher is installed", where="fabric.launch()", instead="install one")
        clash = start_clash(self._strategy, self._accelerator)
        if clash is not None:
            raise LaunchError(
                f"the strategy can't start processes: {clash}",
                where="fabric.launch()",
                instead="launch before anything uses a device, or another way of starting",
            )
        _, launcher = self._launchers[0]
        return launcher.start(
            LaunchOrder(
                processes=len(self._plan.device_indices),
                nodes=self._plan.num_nodes,
                start_method=self.strategy.start_method,
                function=None if function is None else _launched,
                args=() if function is None else (self, function, args, kwargs),
            )
        )

    def _rank(self) -> int | None:
        return None if self._world is None else self._world.global_rank

    def _join(self, launcher: Launcher | None, ranks: ProcessInfo) -> None:
        world = make_world(ranks, self._plan, _TIMEOUT)
        if launcher is not None:
            self._launcher = launcher
            launcher.setup_process(ranks)
            if world.world_size > 1:
                self._failures = Failures(world, launcher)  # and they stay on failure: the first one is shown
                agree(world, self._plan, launcher, self._failures)
        hook = sys.excepthook
        with ExitStack() as undo:
            undo.callback(self._accelerator.teardown)
            self._accelerator.setup_device(world.device)
            undo.enter_context(world.closing)
            undo.callback(self._strategy.teardown)
            own = self._strategy.connect(world, self.precision.policy)
            check_connected(own, world, self.strategy)
            self._collectives = self.strategy.collectives = own.fork() if world.world_size > 1 else own
            self._precision.connect(self._collectives)
            undo.pop_all()
        sys.excepthook = hook  # torch's process group puts one round it, each time, for good
        self._world = world
        self._hooks.launched(world=world)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process as the request, which is resolved again there, and what a subclass added."""
        own = {name: value for name, value in vars(self).items() if name not in {*self._built, "_built"}}
        return {"own": own, "registrations": registrations()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Resolve the request in this process."""
        for offer in state["registrations"]:
            register(offer.kind, offer.name, offer.loaded, override=True)
        self.__dict__.update(state["own"])
        self._build()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Override to put the training into a subclass; call ``fabric.launch(...)`` from it.

        Raises:
            MisuseError: It is not overridden.
        """
        raise MisuseError(
            "run is not overridden",
            where=type(self).__name__,
            instead="def run(self, ...): in a subclass",
        )

    # Setting up

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: Any = None,
        move_to_device: bool = True,
    ) -> Any:
        """Make a model and its optimizers ready.

        Args:
            module: The model.
            optimizers: Its optimizers, made before or after other models were set up.
            scheduler: A learning-rate scheduler; it comes back as it is, and steps the same optimizer.
            move_to_device: Move the model to this process's device.

        Returns:
            The wrapped model; with optimizers a tuple of it, the wrapped optimizers, and the scheduler if given.

        Raises:
            SetupError: Something was set up before, or an optimizer's parameters can't be matched, or an optimizer
                holds no parameter of this model, nor of any that was set up before.
        """
        for optimizer in optimizers:
            check_optimizer(optimizer, self._set_up)
            if isinstance(module, nn.Module):
                check_trains(optimizer, [module, *self._set_up], self._replaced)
        model, ready = self._setup_module(module, optimizers, move_to_device=move_to_device)
        if not optimizers and scheduler is None:
            return model
        wrapped = [self._wrap_optimizer(one, made) for one, made in zip(optimizers, ready, strict=True)]
        return (model, *wrapped) if scheduler is None else (model, *wrapped, scheduler)

    def setup_module(self, module: nn.Module, move_to_device: bool = True) -> FabricModule:
        """Make a model ready.

        Args:
            module: The model; one that went through ``torch.compile`` is compiled again outside the strategy's wrapper,
                with the same arguments.
            move_to_device: Move it to this process's device.

        Raises:
            SetupError: It was set up before, is no module, or its parameters are on several devices or on none.
        """
        return self._setup_module(module, (), move_to_device=move_to_device)[0]

    def _setup_module(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, move_to_device: bool
    ) -> tuple[FabricModule, list[Optimizer]]:
        """Make a model ready, and the optimizers that are given with it."""
        declared, world = self.strategy.capabilities, self.world
        check_counts(self.strategy, len(self._models), len(optimizers))
        given, module = module, uncompiled(module)
        check_model(module, self._set_up, move=move_to_device, placed_later=declared.handles_device_placement)
        before = dict(module.named_parameters(remove_duplicate=False))
        module = self._precision.convert_module(module)
        if move_to_device and not declared.handles_device_placement:
            module = module.to(world.device)
        for wrapper in self._stage("before_strategy"):
            check_same(wrapper.wrap_module(module), module, wrapper)
        outer = Route(module) if declared.intercepts_forward else module
        ready: list[Optimizer] = []
        if declared.joint_setup:
            inner, ready = self._strategy.setup_jointly(outer, optimizers)
        else:
            inner = self._strategy.setup_module(outer)
        called = inner
        for wrapper in self._stage("after_strategy"):
            called = wrapper.wrap_module(called)
        if given is not module and uncompiled(given) is not given:
            called = compile_again(given, called)
        after = dict(module.named_parameters(remove_duplicate=False))
        self._replaced.update({old: after[name] for name, old in before.items() if after[name] is not old})
        for optimizer in self._optimizers:
            # One that was set up before its model holds parameters that are trained no more.
            self._strategy.setup_optimizer(optimizer, self._replaced)
        wrapped = FabricModule(
            module,
            called,
            inner=inner,
            routed=declared.intercepts_forward,
            around=Around(
                precision=self._precision,
                carried=declared.applies_mixed_precision and self._precision.policy.autocast,
                wrappers=tuple(self._wrappers),
                guard=self._guard,
            ),
            device=world.device if move_to_device else first_device(module) or world.device,
        )
        self._set_up.add(module)
        self._models.add(wrapped)
        self._hooks.module_set_up(module=wrapped)
        if not declared.joint_setup:
            ready = [self._strategy.setup_optimizer(optimizer, self._replaced) for optimizer in optimizers]
        return wrapped, ready

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Make optimizers ready.

        Returns:
            The wrapped optimizer, or a tuple of them.

        Raises:
            SetupError: One was set up before, or its parameters can't be matched, or the strategy needs it together
                with its model.
        """
        if self.strategy.capabilities.joint_setup:
            raise SetupError(
                f"{type(self.strategy).__name__} sets an optimizer up together with its model",
                where="fabric.setup_optimizers",
                instead="fabric.setup(model, optimizer)",
            )
        for optimizer in optimizers:
            check_optimizer(optimizer, self._set_up)
        self.world  # noqa: B018 - connects a single process
        ready = [self._strategy.setup_optimizer(optimizer, self._replaced) for optimizer in optimizers]
        wrapped = tuple(self._wrap_optimizer(one, made) for one, made in zip(optimizers, ready, strict=True))
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def _wrap_optimizer(self, optimizer: Optimizer, ready: Optimizer) -> FabricOptimizer:
        self._optimizers.add(ready)
        for wrapper in self._wrappers:
            ready = wrapper.wrap_optimizer(ready)
        self._set_up.add(optimizer)
        return wrap_optimizer(ready, self._strategy, self._precision)

    def setup_dataloaders(
        self, *dataloaders: Any, use_distributed_sampler: bool = True, move_to_device: bool = True
    ) -> Any:
        """Make data loaders ready; every rank must call it.

        Args:
            dataloaders: The loaders.
            use_distributed_sampler: Let each rank read its own part, where the strategy divides data: any sampler's
                order is drawn from the seed of rank 0, the same on every rank, and divided.
            move_to_device: Move batches to this process's device.

        Returns:
            The wrapped loader, or a list of them.

        Raises:
            SetupError: One was set up before, or keeps its samplers where they can't be replaced.
        """
        self.world  # noqa: B018 - connects a single process
        wrapped = []
        for given in dataloaders:
            if is_wrapped(given):
                raise SetupError(
                    "the loader was set up before",
                    where="fabric.setup_dataloaders",
                    instead="use it as it is",
                )
            loader = given
            if use_distributed_sampler:
                loader = shard(loader, *self._strategy.data_shard(), lambda seed: self._strategy.broadcast(seed, 0))
            for wrapper in self._wrappers:
                loader = wrapper.wrap_dataloader(loader)
            wrapped.append(FabricDataLoader(loader, self.device if move_to_device else None, given))
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def _stage(self, stage: str) -> Iterator[Wrapper]:
        return (wrapper for wrapper in self._wrappers if wrapper.capabilities.stage == stage)

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make a model on the device and in the precision that it will have.

        Args:
            empty_init: Leave the memory unset, because a checkpoint will fill it.
        """
        with ExitStack() as stack:
            if not self.strategy.capabilities.handles_device_placement:
                stack.enter_context(self.device)
            context = self._precision.init_context()
            if context is not None:
                stack.enter_context(context)
            stack.enter_context(self._strategy.init_module(bool(empty_init)))
            yield

    @contextmanager
    def init_tensor(self) -> Iterator[None]:
        """Make tensors on the device and in the precision's type."""
        with ExitStack() as stack:
            stack.enter_context(self.device)
            context = self._precision.init_context()
            if context is not None:
                stack.enter_context(context)
            yield

    def to_device(self, obj: Any) -> Any:
        """Move a model, a tensor, or every tensor of a nested value to this process's device."""
        return obj.to(self.device) if isinstance(obj, nn.Module) else to_device(obj, self.device)

    # Training

    def autocast(self) -> AbstractContextManager[Any]:
        """Give the precision's forward context, for computations outside a model."""
        return self._precision.forward_context(self.device.type) or ExitStack()

    def backward(self, tensor: torch.Tensor, *args: Any, model: FabricModule | None = None, **kwargs: Any) -> None:
        """Run the backward pass in the place of ``tensor.backward()``.

        Args:
            tensor: What to differentiate.
            args: As for ``torch.Tensor.backward``.
            model: The model that it came from; needed by strategies that have an engine for each model.
            kwargs: As for ``torch.Tensor.backward``.
        """
        if args:
            kwargs.update(zip(_BACKWARD[: len(args)], args, strict=True))
        loss = self._precision.scale_loss(tensor)
        module = self._called(model)
        if self._guard is None:
            self._strategy.backward(loss, module, kwargs)
        else:
            with self._guard.opened():
                self._strategy.backward(loss, module, kwargs)

    def _called(self, model: FabricModule | None) -> nn.Module | None:
        """Give what the strategy made of a model; without one, of the only one that is set up."""
        if model is not None:
            return strategy_module(model)
        models = list(self._models)
        return strategy_module(models[0]) if len(models) == 1 else None

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool | None = None,
    ) -> torch.Tensor | None:
        """Clip the gradients of an optimizer's parameters, by value or by norm.

        Args:
            module: The model whose parameters they are.
            optimizer: The optimizer.
            clip_val: Clip each element into ``[-clip_val, clip_val]``.
            max_norm: Clip the total norm to this.
            norm_type: The p of the p-norm.
            error_if_nonfinite: Raise where the norm is not finite. Not given, it is true unless the precision scales
                the loss: then a gradient overflows now and then, and the optimizer skips that step.

        Returns:
            The total norm before clipping; ``None`` when clipped by value.

        Raises:
            RuntimeError: The norm is not finite, and that is an error.
            RequestError: Both or none of ``clip_val`` and ``max_norm`` are given.
        """
        if (clip_val is None) == (max_norm is None):
            raise RequestError(
                "exactly one way of clipping is needed",
                where="fabric.clip_gradients",
                got=f"clip_val={clip_val}, max_norm={max_norm}",
                instead="clip_val=... or max_norm=...",
            )
        self._precision.unscale_gradients(unwrap(optimizer))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if clip_val is not None:
            # PyTorch's function fails where there is nothing to clip.
            with_gradients = [parameter for parameter in parameters if parameter.grad is not None]
            if with_gradients:
                self._strategy.clip_grad_value(with_gradients, clip_val)
            return None
        if max_norm is None:
            raise AssertionError("one of the two is given")
        if error_if_nonfinite is None:
            error_if_nonfinite = not self.precision.policy.loss_scaling
        return self._strategy.clip_grad_norm(parameters, float(max_norm), float(norm_type), error_if_nonfinite)

    def no_backward_sync(self, module: FabricModule, enabled: bool = True) -> AbstractContextManager[Any]:
        """Skip gradient synchronization inside the context, to accumulate over several backward passes.

        Args:
            module: A model that was set up.
            enabled: Whether to; otherwise the context changes nothing.

        Raises:
            MisuseError: The model was not set up.
        """
        if not isinstance(module, FabricModule):
            raise MisuseError(
                "the model was not set up", where="fabric.no_backward_sync", got=type(module).__name__,
                instead="what fabric.setup returned",
            )  # fmt: skip
        return self._strategy.no_backward_sync(strategy_module(module), enabled)

    # Between ranks

    def _connected(self) -> Collectives:
        self.world  # noqa: B018 - connects a single process
        return self._collectives

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on one process of each node."""
        if self.local_rank == 0:
            print(*args, **kwargs)  # noqa: T201 - what it is for

    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank is here."""
        self._connected().barrier(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give every rank the object of one."""
        return self._connected().broadcast(obj, src)

    def all_reduce(self, data: Any, group: Any | None = None, reduce_op: str | None = "mean") -> Any:
        """Reduce every tensor of a nested value over the ranks; numbers become tensors."""
        collectives = self._connected()
        return map_tensors(
            _tensors(data, self.device),
            lambda one: collectives.all_reduce(one, group, reduce_op or "sum"),
        )

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Gather every tensor of a nested value over the ranks.

        Returns:
            The same nesting, each tensor of shape ``(world size, *shape)``; a list where shapes differ. With one
            process the shapes are those that were given, as Lightning Fabric's.
        """
        collectives = self._connected()

        def gather(one: torch.Tensor) -> Any:
            parts = collectives.all_gather(one, group, sync_grads)
            if self.world_size == 1:
                return parts[0]
            return torch.stack(parts) if len({part.shape for part in parts}) == 1 else parts

        return map_tensors(_tensors(data, self.device), gather)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Let rank 0 run the block before all others.

        They wait as long as for any collective: where rank 0 takes more than the usual 30 minutes, raise the strategy's
        ``timeout``, as in ``Fabric(strategy="ddp:timeout=PT3H")``.

        Args:
            local: Each node's local rank 0, instead of the one global rank 0.

        Raises:
            LaunchError: On the other ranks, when rank 0 raised; they do not run the block.
        """
        world = self.world
        first = range(0, world.world_size, world.local_world_size) if local else range(1)
        if world.global_rank in first:
            try:
                yield
            except BaseException as error:
                self._tell(first, f"{type(error).__name__}: {error}")
                raise
            self._tell(first, None)
            return
        failures = self._tell(first, None)
        if failures:
            raise LaunchError(
                "; ".join(f"rank {rank} failed: {text}" for rank, text in failures.items()),
                where="fabric.rank_zero_first",
            )
        yield

    def _tell(self, ranks: range, text: str | None) -> dict[int, str]:
        """Send a text from each of some ranks to all; gives what they sent, where it is one."""
        sent = {rank: self._collectives.broadcast(text, rank) for rank in ranks}
        return {rank: one for rank, one in sent.items() if one is not None}

    # State

    def save(
        self,
        path: str | Path,
        state: Mapping[str, Any],
        filter: Mapping[str, Callable[[str, Any], bool]] | None = None,  # noqa: A002 - Lightning Fabric's
    ) -> None:
        """Save a state; every rank must call it.

        Args:
            path: Where to.
            state: Models, optimizers, objects with ``state_dict`` and plain values, under their names.
            filter: For a name of the state, which of its entries to save.

        Raises:
            CheckpointError: It can't be written, or holds what could not be read again.
        """
        path = Path(path)
        check_named(state, "fabric.save")
        self.world  # noqa: B018 - connects a single process
        checkpoint = self._checkpoint(sharded=self.strategy.saves_sharded)
        full = not checkpoint.capabilities.sharded
        tree = collect(_unwrapped(state), self._strategy, self._precision, full=full, keep=filter or {})
        failure: Exception | None = None
        if self.is_global_zero or not full:
            try:
                checkpoint.write(path, tree)
            except CheckpointError as error:
                failure = error
        failure = self.broadcast(failure)
        if failure is not None:
            raise failure
        self._hooks.checkpoint_saved(path=path)

    def load(self, path: str | Path, state: dict[str, Any] | None = None, strict: bool = True) -> dict[str, Any]:
        """Load a checkpoint into a state, in place; every rank must call it.

        Args:
            path: Where from.
            state: What to fill; ``None`` gives back everything that the checkpoint has.
            strict: Everything that the state asks for must be there.

        Returns:
            What the checkpoint has beyond the state.

        Raises:
            CheckpointError: There is no checkpoint, it can't be read, or it lacks something. Where names, shapes or an
                optimizer's groups don't fit, nothing has changed.
        """
        path = Path(path)
        checkpoint = self._recognised(path)
        full = not checkpoint.capabilities.sharded
        if state is None:
            return checkpoint.read(path, None)
        check_named(state, "fabric.load")
        self.world  # noqa: B018 - connects a single process
        objects = _unwrapped(state)
        # What doesn't fit must be found before anything changes: the parts of a sharded checkpoint are read in place.
        tree = checkpoint.read(path, None) if full else checkpoint.outline(path)
        check_fits(objects, tree, self._strategy, strict=strict, path=path)
        restore_precision(tree, self._precision, path=path)
        if not full:
            tree = checkpoint.read(path, template(objects, tree, self._strategy))
        state.update(restore(objects, tree, self._strategy, full=full, strict=strict))
        return {name: entry for name, entry in tree.items() if name not in {*state, PRECISION}}

    def load_raw(self, path: str | Path, obj: Any, strict: bool = True) -> None:
        """Load a file that holds one bare state dict into one model or optimizer."""
        path = Path(path)
        state, tree = {"obj": unwrap(obj)}, {"obj": self._recognised(path).read(path, None)}
        check_fits(state, tree, self._strategy, strict=strict, path=path)
        restore(state, tree, self._strategy, full=True, strict=strict)

    def _checkpoint(self, *, sharded: bool) -> Checkpoint:
        for _, checkpoint in self._checkpoints:
            # The only one there is was given by the user.
            if checkpoint.capabilities.sharded == sharded or len(self._checkpoints) == 1:
                return checkpoint
        raise CheckpointError("no checkpoint format is installed that fits", where="fabric.save")

    def _recognised(self, path: Path) -> Checkpoint:
        for _, checkpoint in self._checkpoints:
            if checkpoint.recognises(path):
                return checkpoint
        raise CheckpointError(
            "there is no checkpoint" if not path.exists() else "no installed format recognises the checkpoint",
            where=str(path),
            got=None if not path.exists() else f"formats: {', '.join(name for name, _ in self._checkpoints)}",
        )

    # Saying what happens

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of every callback that has it.

        Raises:
            TypeError: A callback's attribute of that name can't be called.
        """
        for callback in self._request.callbacks:
            method = getattr(callback, hook_name, None)
            if method is None:
                continue
            if not callable(method):
                raise TypeError(f"{type(callback).__name__}.{hook_name} can't be called")
            method(*args, **kwargs)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Give a number to the loggers."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Give numbers to the loggers, on rank 0."""
        if not self._loggers or not self.is_global_zero:
            return
        numbers = {name: float(value) for name, value in metrics.items()}
        for logger in self._loggers:
            logger.log_metrics(numbers, step)

    @staticmethod
    def seed_everything(seed: int = 0) -> int:
        """Seed Python, NumPy and PyTorch, the same on every rank."""
        return seeding.seed_everything(seed)

    # The end

    def teardown(self) -> None:
        """Give back all that was taken: process group, devices, loggers. May be called again."""
        world, launcher, failures = self._world, self._launcher, self._failures
        self._world = self._launcher = self._failures = None
        if failures is not None:
            failures.end(sys.exc_info()[1])
        with ExitStack() as stack:
            if launcher is not None:
                stack.callback(launcher.teardown)
            if world is None:
                return
            stack.callback(self._accelerator.teardown)
            stack.enter_context(world.closing)
            stack.callback(self._strategy.teardown)
            self.strategy.collectives = None
            for logger in self._loggers:
                stack.callback(logger.finalize, "success")
        self._hooks.torn_down()

    def __enter__(self) -> Self:
        """Tear down at the end of a ``with`` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Tear down."""
        self.teardown()


def _launched(fabric: Fabric, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a function in a rank that was started for it."""
    try:
        return fabric.launch(function, *args, **kwargs)
    finally:
        fabric.teardown()


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Give the user's own models and optimizers, which is what a strategy knows; loaders keep their own state."""
    return {name: value if isinstance(value, FabricDataLoader) else unwrap(value) for name, value in state.items()}


def _tensors(data: Any, device: torch.device) -> Any:
    """Turn the numbers of a nested value into tensors."""
    return tree_map_only((bool, int, float), lambda number: torch.as_tensor(number, device=device), data)
