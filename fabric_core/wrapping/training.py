"""What a script calls to set up and to train."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Final, TypeVar, overload

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.choosing.request import Request
from fabric_core.collectives import World
from fabric_core.contracts import FabricActs, Precision, Strategy
from fabric_core.errors import MisuseError, RequestError
from fabric_core.wrapping.checks import check_given
from fabric_core.wrapping.dataloader import FabricDataLoader, to_device
from fabric_core.wrapping.module import FabricModule
from fabric_core.wrapping.optimizer import FabricOptimizer, take_step
from fabric_core.wrapping.setup import Setup, check_set_up
from fabric_core.wrapping.unwrap import unwrap

__all__ = ["Acts", "Training"]

Model = nn.Module | Callable[..., Any]
"""A model; what ``torch.compile`` makes of one is a callable to type checkers."""

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)
"""An optimizer's class: a wrapped one is an instance of it too."""

_BACKWARD: Final = ("gradient", "retain_graph", "create_graph", "inputs")
"""The arguments of ``torch.Tensor.backward``, in order."""


class Training:
    """The part of ``Fabric`` that sets up and trains; the rest of it makes what is declared here."""

    _strategy: Strategy
    _precision: Precision
    _hooks: Any
    _acts: "Acts"
    _setup: Setup
    _request: Request
    _world: World | None

    @property
    def world(self) -> World:
        """Who this process is; the class that knows processes says it."""
        raise AssertionError("Processes comes first among the bases of Fabric")

    @property
    def device(self) -> torch.device:
        """Likewise the device."""
        return self.world.device

    # Setting up

    @overload
    def setup(self, module: Model, *, move_to_device: bool = ...) -> FabricModule: ...
    @overload
    def setup(
        self, module: Model, optimizer: OptimizerT, /, *, move_to_device: bool = ...
    ) -> tuple[FabricModule, OptimizerT]: ...
    @overload
    def setup(
        self, module: Model, *optimizers: Optimizer, scheduler: Any = ..., move_to_device: bool = ...
    ) -> tuple[Any, ...]: ...
    def setup(self, module: Model, *optimizers: Optimizer, scheduler: Any = None, move_to_device: bool = True) -> Any:
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
        model, wrapped = self._acts.setup(module, optimizers, move_to_device)
        if not optimizers and scheduler is None:
            return model
        return (model, *wrapped) if scheduler is None else (model, *wrapped, scheduler)

    def setup_module(self, module: Model, move_to_device: bool = True) -> FabricModule:
        """Make a model ready.

        Args:
            module: The model; one that went through ``torch.compile`` is compiled again outside the strategy's wrapper,
                with the same arguments.
            move_to_device: Move it to this process's device.

        Raises:
            SetupError: It was set up before, is no module, or its parameters are on several devices or on none.
        """
        model: FabricModule = self._acts.setup(module, (), move_to_device)[0]
        return model

    @overload
    def setup_optimizers(self, optimizer: OptimizerT, /) -> OptimizerT: ...
    @overload
    def setup_optimizers(self, *optimizers: Optimizer) -> tuple[Any, ...]: ...
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
        for one in wrapped:
            self._hooks.optimizer_set_up(fabric=self, optimizer=one)
        return wrapped[0] if len(wrapped) == 1 else wrapped

    @overload
    def setup_dataloaders(
        self,
        dataloader: Any,
        /,
        *,
        use_distributed_sampler: bool = ...,
        move_to_device: bool = ...,
        repeat_samples: bool = ...,
    ) -> FabricDataLoader: ...
    @overload
    def setup_dataloaders(
        self,
        *dataloaders: Any,
        use_distributed_sampler: bool = ...,
        move_to_device: bool = ...,
        repeat_samples: bool = ...,
    ) -> list[FabricDataLoader]: ...
    def setup_dataloaders(
        self,
        *dataloaders: Any,
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        repeat_samples: bool = True,
    ) -> Any:
        """Make data loaders ready; every rank must call it.

        Args:
            dataloaders: The loaders.
            use_distributed_sampler: Let each rank read its own part, where the strategy divides data: any sampler's
                order is drawn from the seed of rank 0, the same on every rank, and divided.
            move_to_device: Move batches to this process's device.
            repeat_samples: Where the data doesn't divide evenly, repeat some samples, so that every rank reads as many.
                ``False`` gives each sample once, for evaluation; ranks may then have different numbers of batches.

        Returns:
            The wrapped loader, or a list of them.

        Raises:
            SetupError: One was set up before, or keeps its samplers where they can't be replaced; or without repeating
                samples, a rank would have none, or the loader's own sampler repeats them.
        """
        check_given(dataloaders, "dataloader")
        device = self.device  # and connects a single process
        wrapped = [
            self._setup.dataloader(
                one, device if move_to_device else None, divide=use_distributed_sampler, repeat=repeat_samples
            )
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
            if not self._strategy.capabilities.handles_device_placement:
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

    @property
    def models(self) -> list[FabricModule]:
        """The models that were set up and are still in use, in that order."""
        return self._setup.models

    @property
    def step_count(self) -> int:
        """How often the optimizers that were set up were stepped, together; steps that the precision skipped count."""
        return self._acts.steps

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute outside a model as in one: in the precision's forward context, and with tensors made in its type."""
        with ExitStack() as stack:
            for context in (self._precision.forward_context(self.device.type), self._precision.init_context()):
                if context is not None:
                    stack.enter_context(context)
            yield

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
        self._acts.backward(tensor, model, kwargs)

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
            MisuseTypeError: The model is not what ``setup`` returned.
        """
        check_set_up(module, "fabric.clip_gradients")
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
            self._strategy.clip_grad_value(parameters, clip_val)
            return None
        if max_norm is None:
            raise AssertionError("one of the two is given")
        if error_if_nonfinite is None:
            error_if_nonfinite = not self._precision.policy.loss_scaling
        return self._strategy.clip_grad_norm(parameters, float(max_norm), float(norm_type), error_if_nonfinite)

    def no_backward_sync(self, module: FabricModule, enabled: bool = True) -> AbstractContextManager[Any]:
        """Skip gradient synchronization inside the context, to accumulate over several backward passes.

        Args:
            module: A model that was set up.
            enabled: Whether to; otherwise the context changes nothing.

        Raises:
            MisuseTypeError: The model was not set up.
        """
        return self._setup.no_backward_sync(module, enabled=enabled)

    def join(self, *models: FabricModule, divide_by_initial_world_size: bool = True) -> AbstractContextManager[None]:
        """Give a context for a training loop in which ranks have different numbers of batches.

        A rank that is through takes part in what the others still do, with gradients of zero. At the end all ranks have
        the models and optimizer states of the rank that trained longest. Inside, nothing but forward and
        backward passes and steps of these models communicates: each model once in each round, in the order given, and
        no call such as ``fabric.all_reduce``.

        Args:
            models: The models that are trained inside.
            divide_by_initial_world_size: Gradients are the sum over the ranks that still train, divided by the number
                of ranks; ``False`` divides by the number of those that still train.

        Raises:
            SetupError: The strategy shards models or the precision scales the loss, for which every rank needs the same
                number of batches.
            MisuseError: The ``Fabric`` compares what the ranks do (``check=True``), which differs here.
            MisuseTypeError: A model was not set up.
        """
        if self._request.check:
            raise MisuseError(
                "fabric.join lets ranks do different things, which the checked mode refuses",
                where="fabric.join",
                got="check=True",
                instead="Fabric(check=False) for this loop",
            )
        return self._setup.join(models, divide_by_initial_world_size=divide_by_initial_world_size)


class Acts(FabricActs):
    """What a ``Fabric`` does; the object holds it weakly, so that it ends with its last user.

    Args:
        fabric: The ``Fabric``.
    """

    def __init__(self, fabric: Any) -> None:
        self._living = weakref.ref(fabric)
        self.steps = 0

    @property
    def _fabric(self) -> Any:
        return self._living()

    def setup(
        self, module: Any, optimizers: Sequence[Optimizer], move_to_device: bool
    ) -> tuple[FabricModule, Sequence[FabricOptimizer]]:
        """Set up, and tell who listens."""
        fabric = self._fabric
        model, wrapped = fabric._setup.module(module, optimizers, fabric.world, move=move_to_device)
        fabric._hooks.module_set_up(fabric=fabric, module=model)
        for one in wrapped:
            fabric._hooks.optimizer_set_up(fabric=fabric, optimizer=one)
        return model, wrapped

    def backward(self, tensor: torch.Tensor, model: Any, arguments: Mapping[str, Any]) -> None:
        """Scale the loss, and let the strategy run the pass."""
        fabric = self._fabric
        if fabric._world is None:
            fabric.world  # noqa: B018 - connects a single process, and refuses several that are not launched
        loss = fabric._precision.scale_loss(tensor)
        context = fabric._precision.backward_context()
        try:
            with fabric._setup.backward_pass(), context or nullcontext():
                fabric._strategy.backward(loss, fabric._setup.called(model), arguments)
        except RuntimeError as error:
            if fabric._failures is not None:
                fabric._failures.tell_alone(error, "fabric.backward")
            raise

    def step(self, optimizer: Any, closure: Callable[[], Any] | None) -> Any:
        """Step, and tell who listens."""
        result = take_step(optimizer, closure)
        self.steps += 1
        fabric = self._fabric
        # An optimizer may outlive its Fabric; and a call of a hook costs more than all the rest.
        if fabric is not None and fabric._hooks.stepped.get_hookimpls():
            fabric._hooks.stepped(fabric=fabric, optimizer=optimizer)
        return result

    def save(self, path: Any, state: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Save, and tell who listens."""
        fabric = self._fabric
        collectives = fabric._connected()
        return fabric._checkpointing.save(
            path, state, collectives, lambda where: fabric._hooks.checkpoint_saved(fabric=fabric, path=where), **options
        )

    def load(self, path: Any, state: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Load, and tell who listens."""
        fabric = self._fabric
        rest: dict[str, Any]
        where, rest = fabric._checkpointing.load(path, state, fabric._connected(), **options)
        fabric._hooks.checkpoint_loaded(fabric=fabric, path=where)
        return rest
