"""The contract of a strategy: how processes train one model together."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from fabric_core.collectives import Collectives, ProcessInfo, World
from fabric_core.contracts._spec import Plugin
from fabric_core.contracts.capabilities import StrategyCapabilities
from fabric_core.contracts.memory import MemoryEstimate
from fabric_core.contracts.precision import PrecisionPolicy
from fabric_core.errors import MisuseError
from fabric_core.markers import behaviour

__all__ = ["Strategy"]


class Strategy(Plugin, ABC):
    """How processes train one model together.

    The defaults are those of one process that trains alone.

    [Note: when gradients are averaged] After the last backward pass of an iteration, and before ``optimizer_step``
    returns, gradients are averaged over the ranks, each once. When is the strategy's choice: in ``backward``, in hooks
    of autograd, or in whichever of ``optimizer_step``, ``clip_grad_norm`` and ``clip_grad_value`` comes first. Until a
    step or a clipping, nobody may count on either the mean or a rank's own. Under ``joint_setup`` an engine may keep
    them elsewhere than in ``grad``.

    [Note: which gradients] A parameter that no rank used in an iteration keeps the gradient that it had, ``None``
    included; where some ranks used it, the others count as zero. Gradients, as parameters, may be of any floating-point
    or complex type, several in one model, and non-contiguous; of the sparse ones, and of whatever else a strategy can't
    take, it says so by an error on every rank.

    [Note: the route] Under a strategy that declares ``intercepts_forward``, the module that ``setup_module`` gets is a
    thin route around the user's module: its ``forward(name, *args, **kwargs)`` runs the user's module, or the method
    ``name`` of it. The user's module is its only child, named ``module``. So a strategy wraps a module as it would
    wrap any other, and every marked method passes through it.
    """

    kind = "strategy"

    capabilities: ClassVar[StrategyCapabilities] = StrategyCapabilities()
    """What the strategy declares."""

    _collectives: Collectives | None = None

    @property
    def collectives(self) -> Collectives:
        """What everything but gradients travels on: a fork of what ``connect`` returned; the core sets it.

        Raises:
            MisuseError: Before ``fabric.launch()``, or after ``fabric.teardown()``.
        """
        if self._collectives is None:
            raise MisuseError(
                "the processes are not connected",
                where=type(self).__name__,
                instead="call fabric.launch() first",
            )
        return self._collectives

    @collectives.setter
    def collectives(self, collectives: Collectives) -> None:
        self._collectives = collectives

    @collectives.deleter
    def collectives(self) -> None:
        self.__dict__.pop("_collectives", None)

    @property
    def start_method(self) -> str | None:
        """How to start processes (``"spawn"``, ``"fork"``, ...); ``None`` leaves it to the launcher."""
        return None

    @property
    def saves_sharded(self) -> bool:
        """Whether ``fabric.save`` writes every rank's own parts; otherwise rank 0 writes whole tensors."""
        return False

    @behaviour
    @abstractmethod
    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join the other processes; called once, before anything else but ``capabilities``.

        Args:
            world: Who this process is.
            policy: What the precision asks for; a strategy that declares ``applies_mixed_precision`` carries it out.

        Returns:
            The collectives that the strategy's own communication travels on, such as ``ProcessGroup(world)``, or
            ``SingleProcess()``. The core closes them when the ``Fabric`` ends, also where this method raised after it
            had made them, and forks them for everything else (``collectives``); extensions are bound on both, so they
            are this ``Fabric``'s alone. A process group that several share is ended by the last of those that made or
            joined it through ``ProcessGroup``; one that was there before, made by the script, by the script.
        """

    @behaviour
    def teardown(self) -> None:
        """Release resources, before the core closes the collectives. May be called again, and without ``connect``."""

    @behaviour
    def estimate_memory(
        self, info: ProcessInfo, policy: PrecisionPolicy, module: nn.Module, optimizer: Optimizer
    ) -> MemoryEstimate:
        """Say what a rank would hold through a step; asked without ``connect``, and of any rank.

        Args:
            info: The rank's place among the others.
            policy: What the precision asks for.
            module: The user's module, converted, after a step of one process alone: its parameters have gradients. Its
                tensors may have no memory: only their shapes and types count.
            optimizer: Its optimizer, likewise, with the state that the step left.

        Returns:
            Bytes of this rank alone. ``parameters`` (with buffers), ``gradients`` and ``optimizer`` are what it holds
            after a backward pass and a step, which the kit counts, to the byte where ranks divide evenly.
            ``in_flight`` is the most at one time of what is gathered or waits to be reduced, and ``in_flight_last``
            what is left of it as ``backward`` ends; both are bounds. What the model computes is not the strategy's to
            say, and comes on top.

        Raises:
            MisuseError: It can't be said. Not overridden, that is so under ``sharded`` and ``joint_setup``; else every
                rank holds everything whole.
        """
        if self.capabilities.sharded or self.capabilities.joint_setup:
            raise MisuseError(
                f"{type(self).__name__} doesn't say what a rank will hold",
                where=f"{type(self).__name__}.estimate_memory",
                instead="a strategy that says it, or a training of a few steps",
            )
        return MemoryEstimate.of(module, optimizer)

    @behaviour
    def init_module(self, empty: bool) -> AbstractContextManager[Any]:
        """Give the context in which a model is made.

        Args:
            empty: Leave the parameters' memory unset where that is possible, because a checkpoint will fill it. Here
                the functions of ``torch.nn.init`` that can be stepped over leave their tensors as they are.
        """
        return _SkipInit() if empty else nullcontext()

    @behaviour
    def setup_module(self, module: nn.Module) -> nn.Module:
        """Wrap or shard a module; every rank's starts with rank 0's parameters and buffers.

        Buffers that change afterwards, such as those of batch normalization, may be each rank's own or rank 0's; whole
        state that is saved has rank 0's. Under ``handles_device_placement``, what lies on the meta device is filled by
        its module's ``reset_parameters``, called once, children first; a module without one is refused, on every rank.

        Args:
            module: The converted, placed module; a route where ``intercepts_forward`` is declared ([Note: the route]).

        Returns:
            The module to call in its place; it takes the same arguments.
        """
        return module

    @behaviour
    def setup_optimizer(self, optimizer: Optimizer, replaced: Mapping[torch.Tensor, torch.Tensor]) -> Optimizer:
        """Make an optimizer ready.

        Args:
            optimizer: The user's optimizer, made before or after ``setup_module``.
            replaced: For each parameter that ``setup_module`` replaced, the one that took its place.

        Returns:
            The optimizer that steps the parameters that are trained; usually the same one, changed in place.

        Raises:
            SetupError: It holds a parameter that can't be matched.
        """
        return replace_parameters(optimizer, replaced)

    @behaviour
    def setup_jointly(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[nn.Module, list[Optimizer]]:
        """Make a model and its optimizers ready in one call; called where ``joint_setup`` is declared, and only there.

        Args:
            module: As for ``setup_module``.
            optimizers: The user's optimizers of this model; none where it is not trained.

        Returns:
            The module to call in its place, and the optimizers to use, in the same order.
        """
        return self.setup_module(module), [self.setup_optimizer(optimizer, {}) for optimizer in optimizers]

    @behaviour
    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Run the backward pass, once; see [Note: when gradients are averaged].

        Args:
            loss: What to differentiate, already scaled.
            module: What ``setup_module`` or ``setup_jointly`` returned for the model that the loss came from; ``None``
                where several are set up and the user named none.
            arguments: Keyword arguments of ``torch.Tensor.backward``.
        """
        loss.backward(**arguments)  # type: ignore[no-untyped-call]

    @behaviour
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step an optimizer, and return what its ``step`` returns; a closure is evaluated as often as ``step`` asks."""
        return optimizer.step() if closure is None else optimizer.step(closure)

    @behaviour
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """Give the context in which backward passes skip gradient synchronization.

        Contexts nest: inside an enabled one every inner one, enabled or not, changes nothing, and the next pass after
        the outermost ends synchronizes all that was gathered.

        Args:
            module: What ``setup_module`` returned.
            enabled: Whether to skip it; otherwise the context changes nothing.
        """
        return nullcontext()

    @behaviour
    def gradients_averaged(self, module: nn.Module, complete: bool) -> bool:
        """Say whether a synchronized backward pass, which is over, averaged all outstanding gradients of a module.

        Asked only under a strategy that is distributed, ``synchronous`` and not ``sharded``, outside
        ``no_backward_sync``.

        Args:
            module: What ``setup_module`` returned.
            complete: The pass reached every parameter that was trainable at setup.

        Returns:
            Whether it did, or will before the step, where the strategy averages then. Not overridden, it stands for a
            strategy that averages all gradients of each module that ``setup_module`` was given, and of no copy.
        """
        return True

    @behaviour
    def gradients_cleared(self, parameters: Sequence[torch.Tensor]) -> None:
        """Clear what is kept of the gradients of these parameters, whose ``grad`` the user has just cleared.

        Asked only under a strategy that is ``sharded``.
        """

    @behaviour
    def clip_grad_norm(
        self,
        parameters: Sequence[torch.Tensor],
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> torch.Tensor:
        """Clip gradients to a total norm.

        Args:
            parameters: Whose gradients to clip.
            max_norm: The largest total norm.
            norm_type: The p of the p-norm; ``inf`` is the largest absolute value.
            error_if_nonfinite: Raise where the total norm is not finite.

        Returns:
            The total norm before clipping, of the whole model, as a plain scalar tensor; the same on every rank.

        Raises:
            RuntimeError: The norm is not finite, and ``error_if_nonfinite``.
        """
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)

    @behaviour
    def clip_grad_value(self, parameters: Sequence[torch.Tensor], clip_value: float) -> None:
        """Clip every gradient's elements into ``[-clip_value, clip_value]``; a parameter's ``grad`` may be ``None``."""
        if held := [one for one in parameters if one.grad is not None]:  # PyTorch's function fails on none
            nn.utils.clip_grad_value_(held, clip_value)

    @behaviour
    def data_shard(self) -> tuple[int, int]:
        """Say which part of the data this process reads: its index, and the number of parts; each rank its own."""
        return self.collectives.rank, self.collectives.world_size

    def all_reduce(self, tensor: torch.Tensor, group: Any | None = None, reduce_op: str = "mean") -> torch.Tensor:
        """Reduce a tensor over the ranks, as ``collectives`` does."""
        return self.collectives.all_reduce(tensor, group, reduce_op)

    def all_gather(
        self, tensor: torch.Tensor, group: Any | None = None, sync_grads: bool = False
    ) -> list[torch.Tensor]:
        """Gather the tensors of all ranks, as ``collectives`` does."""
        return self.collectives.all_gather(tensor, group, sync_grads)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give every rank the object of one, as ``collectives`` does."""
        return self.collectives.broadcast(obj, src)

    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank is here, as ``collectives`` does."""
        self.collectives.barrier(name)

    @behaviour
    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        """Give a module's state, under the bare module's names.

        Args:
            module: The user's module, after ``setup_module``.
            full: Whole tensors on the CPU on rank 0 (other ranks may get an empty dict); else each rank's own part.
                Under ``joint_setup``, where an engine's parts have no names outside of it, whole tensors on every rank.
        """
        return module.state_dict()

    @behaviour
    def load_module_state(
        self,
        module: nn.Module,
        state: Mapping[str, Any],
        full: bool,
        strict: bool,
    ) -> None:
        """Load what ``module_state`` gave, saved under any strategy or world size.

        Args:
            module: The user's module, after ``setup_module``.
            state: The state, on every rank.
            full: Whether the tensors are whole; else they are this rank's own parts.
            strict: A missing or an additional key is an error.

        Raises:
            RuntimeError: Keys or shapes don't match.
        """
        module.load_state_dict(state, strict=strict)

    @behaviour
    def optimizer_state(self, optimizer: Optimizer, full: bool) -> dict[str, Any]:
        """Give an optimizer's state in the form of ``torch.optim.Optimizer.state_dict``; ``full`` as for a module."""
        return optimizer.state_dict()

    @behaviour
    def load_optimizer_state(
        self,
        optimizer: Optimizer,
        state: Mapping[str, Any],
        full: bool,
    ) -> None:
        """Load what ``optimizer_state`` gave, saved under any strategy or world size.

        As ``torch.optim.Optimizer.load_state_dict`` does, it takes the groups' settings from the state, such as the
        learning rate, and replaces all state that the optimizer has gathered.
        """
        optimizer.load_state_dict(dict(state))

    @behaviour
    def state_dict(self) -> dict[str, Any]:
        """Give what the strategy itself must save to continue, such as a step counter, as plain values and tensors.

        It travels with every checkpoint that ``fabric.save`` writes; called on every rank, and rank 0's is kept.
        """
        return {}

    @behaviour
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave; called on every rank."""


class _SkipInit(TorchFunctionMode):
    """Gives the tensor back, as it is, from every function of ``torch.nn.init`` that lets a mode step in."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def replace_parameters(
    optimizer: Optimizer,
    replaced: Mapping[torch.Tensor, torch.Tensor],
    convert: Callable[[str, Any, torch.Tensor], Any] = lambda _name, value, _parameter: value,
) -> Optimizer:
    """Put new parameters in the place of old ones in an optimizer, in place, its state included.

    Args:
        optimizer: The optimizer.
        replaced: For each old parameter, the one that takes its place.
        convert: Given the name and value of an entry of a parameter's state, and the new parameter, gives the new
            value. Without it state stays as it is, which fits parameters of the same shape and layout.
    """
    for group in optimizer.param_groups:
        # In place: some optimizers, such as LBFGS, hold on to the list.
        group["params"][:] = [replaced.get(parameter, parameter) for parameter in group["params"]]
    for old in [parameter for parameter in optimizer.state if parameter in replaced]:
        new = replaced[old]
        optimizer.state[new] = {name: convert(name, value, new) for name, value in optimizer.state.pop(old).items()}
    return optimizer
