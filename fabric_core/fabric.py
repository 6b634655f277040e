"""The façade: everything a training script calls, in the order of a script's life."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, Self
from weakref import finalize

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.assembly import assemble
from fabric_core.choosing.plan import Plan
from fabric_core.choosing.registry import register, registrations
from fabric_core.choosing.request import Request, fill, read_environment, read_file
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import (
    Accelerator,
    Launcher,
    Logger,
    Precision,
    Strategy,
    World,
    Wrapper,
)
from fabric_core.errors import MisuseError, RequestError
from fabric_core.running import reporting, seeding
from fabric_core.running.asynchronous import SaveHandle
from fabric_core.running.checkpointing import Checkpointing, numbered
from fabric_core.running.launching import environment
from fabric_core.running.processes import Processes
from fabric_core.wrapping import (
    FabricDataLoader,
    FabricModule,
    Setup,
    to_device,
    unwrap,
)

__all__ = ["Fabric"]

_BACKWARD: Final = ("gradient", "retain_graph", "create_graph", "inputs")
"""The arguments of ``torch.Tensor.backward``, in order."""
_TIMEOUT: Final = timedelta(minutes=30)


class Fabric(Processes):
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
        RequestError: An argument can't be parsed.
        PluginError: A plugin is not available, or can't be loaded.
        PlanError: The choices don't fit together.
    """

    _setup: Setup
    _checkpointing: Checkpointing

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
        assembly = assemble(self._request, environment(), self._rank)
        self._chosen, self._bindings, self._hooks = assembly.chosen, assembly.bindings, assembly.hooks
        self._plan = self._chosen.plan
        self._accelerator: Accelerator = self._chosen.one("accelerator")
        self._strategy: Strategy = self._chosen.one("strategy")
        self._precision: Precision = self._chosen.one("precision")
        self._wrappers: list[Wrapper] = self._chosen.all("wrapper")
        self._launchers = self._chosen.ranked("launcher")
        self._wrappers_by_name = numbered(
            [(choice.name, one) for choice, one in zip(self._plan.wrappers, self._wrappers, strict=True)]
        )
        self._checkpointing = Checkpointing(
            strategy=self._strategy,
            precision=self._precision,
            wrappers=self._wrappers_by_name,
            formats=self._chosen.ranked("checkpoint"),
            plan=self._plan.as_dict(),
            own=_own,
        )
        self._loggers: list[Logger] = self._chosen.all("logger")
        self._launcher: Launcher | None = None
        self._closing: finalize[..., Any] | None = None
        self._setup = Setup(self._strategy, self._precision, self._wrappers, self._plan.world_size)
        self._built = set(vars(self)) - own
        try:
            self._hooks.configured(plan=self._plan)
        except BaseException:
            self._bindings.undo()
            raise

    # What was chosen

    @property
    def plan(self) -> Plan:
        """What was chosen for every kind, and why; ``print`` shows a table."""
        return self._plan

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator that was chosen."""
        return self._accelerator

    @property
    def strategy(self) -> Strategy:
        """The strategy that was chosen."""
        return self._strategy

    @property
    def precision(self) -> Precision:
        """The precision that was chosen."""
        return self._precision

    @property
    def wrappers(self) -> Mapping[str, Wrapper]:
        """The wrappers, in their order, by the names that they were chosen by; by class where an instance was given.

        The second of one name has ``#2`` after it.
        """
        return self._wrappers_by_name

    @property
    def loggers(self) -> list[Any]:
        """The loggers, as they were given."""
        return [getattr(logger, "original", logger) for logger in self._loggers]

    @property
    def logger(self) -> Any:
        """The first logger.

        Raises:
            MisuseError: There is none.
        """
        if not self._loggers:
            raise MisuseError("there is no logger", where="fabric.logger", instead="Fabric(loggers=...)")
        return self.loggers[0]

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process as the request, which is resolved again there, and what a subclass added."""
        own = {name: value for name, value in vars(self).items() if name not in {*self._built, "_built"}}
        return {"own": own, "registrations": registrations()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Resolve the request in this process."""
        for offer in state["registrations"]:
            register(offer.kind, offer.name, offer.loaded, override=True, auto=offer.auto)
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
        model, wrapped = self._setup.module(module, optimizers, self.world, move=move_to_device)
        self._hooks.module_set_up(module=model)
        if not optimizers and scheduler is None:
            return model
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
        model, _ = self._setup.module(module, (), self.world, move=move_to_device)
        self._hooks.module_set_up(module=model)
        return model

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Make optimizers ready.

        Returns:
            The wrapped optimizer, or a tuple of them.

        Raises:
            SetupError: One was set up before, or its parameters can't be matched, or the strategy needs it together
                with its model.
        """
        self.world  # noqa: B018 - connects a single process
        wrapped = tuple(self._setup.optimizers(optimizers))
        return wrapped[0] if len(wrapped) == 1 else wrapped

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
        device = self.device  # and connects a single process
        wrapped = [
            self._setup.dataloader(one, device if move_to_device else None, divide=use_distributed_sampler)
            for one in dataloaders
        ]
        return wrapped[0] if len(wrapped) == 1 else wrapped

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
        with self._setup.backward_pass():
            self._strategy.backward(loss, self._setup.called(model), kwargs)

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
        return self._setup.no_backward_sync(module, enabled=enabled)

    # State

    def save(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Any],
        filter: Mapping[str, Callable[[str, Any], bool]] | None = None,  # noqa: A002 - Lightning Fabric's
        asynchronous: bool | Literal["queued"] = False,
        *,
        format: str | None = None,  # noqa: A002 - what it is called everywhere
        keep: int | None = None,
        score: float | None = None,
    ) -> SaveHandle | None:
        """Save a state; every rank must call it.

        Args:
            path: Where to: a path, or a URL such as ``"s3://bucket/name"``.
            state: Models, optimizers, objects with ``state_dict`` and plain values, under their names, nested in dicts,
                lists and tuples as deep as one likes.
            filter: For a name of the state, which of its entries to save.
            asynchronous: Return once the state is copied to host memory, and write in the background; an earlier save
                that is still written is waited for, unless this is ``"queued"``.
            format: The checkpoint format; else the path's ending chooses it, or what the strategy's state is.
            keep: How many checkpoints stay of those beside this one whose names differ in numbers alone.
            score: With ``keep``, those with the lowest scores stay, not the newest.

        Returns:
            Where ``asynchronous``, a handle; its ``result()`` waits.

        Raises:
            CheckpointError: It can't be written, or holds what could not be read again; on every rank. What lay there
                before is still there.
        """
        return self._checkpointing.save(
            path, state, self._connected(), lambda where: self._hooks.checkpoint_saved(path=where),
            filter=filter, asynchronous=asynchronous, format=format, keep=keep, score=score,
        )  # fmt: skip

    def load(
        self,
        path: str | os.PathLike[str],
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint into a state, in place; every rank must call it.

        Args:
            path: Where from; ``folder/latest`` is the newest checkpoint of a folder, if nothing has that name.
            state: What to fill; ``None`` gives back everything that the checkpoint has.
            strict: Everything that the state asks for must be there.
            weights_only: ``None`` and ``True`` read data alone; ``False`` also makes pickled objects, which runs what
                the file says: only for a file that you trust.

        Returns:
            What the checkpoint has beyond the state.

        Raises:
            CheckpointError: There is no checkpoint, or it can't be read or doesn't fit; on every rank, and nothing has
                changed.
        """
        return self._checkpointing.load(path, state, self._connected(), strict=strict, weights_only=weights_only)[1]

    def load_raw(
        self, path: str | os.PathLike[str], obj: Any, strict: bool = True, *, weights_only: bool | None = None
    ) -> None:
        """Load a file that holds one bare state dict into one model or optimizer; ``weights_only`` as for ``load``."""
        self._checkpointing.load_raw(path, obj, self._connected(), strict=strict, weights_only=weights_only)

    # Saying what happens

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of every callback that has it, with the arguments, and the keywords that it takes.

        Raises:
            TypeError: A callback's attribute of that name can't be called.
        """
        reporting.call(self._request.callbacks, hook_name, args, kwargs)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Give a number to the loggers."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Give numbers to the loggers, on rank 0.

        Args:
            metrics: Under their names numbers, or tensors and arrays of one element; what else there is goes to the
                loggers as it is.
            step: The step that they belong to; not given, each logger counts.

        Raises:
            RequestError: A tensor or array has several elements, or none.
        """
        if not self._loggers or not self.is_global_zero:
            return
        numbers = reporting.numbers(metrics)
        for logger in self._loggers:
            logger.log_metrics(numbers, step)

    @staticmethod
    def seed_everything(seed: int = 0) -> int:
        """Seed Python, NumPy and PyTorch, the same on every rank."""
        return seeding.seed_everything(seed)


def _own(value: Any) -> Any:
    """Give the user's own model or optimizer, which is what a strategy knows; loaders keep their own state."""
    return value if isinstance(value, FabricDataLoader) else unwrap(value)
