"""The contract of a strategy: how processes train one model together."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from fabric_core.collectives import World
from fabric_core.contracts._spec import Plugin, behaviour
from fabric_core.contracts.capabilities import StrategyCapabilities
from fabric_core.contracts.precision import PrecisionPolicy
from fabric_core.errors import RequestError

__all__ = ["Strategy"]

_REDUCTIONS: Final = ("sum", "mean", "avg", "max", "min", "product")
"""The operations of ``Strategy.all_reduce``; ``avg`` is ``mean``."""


class Strategy(Plugin, ABC):
    """How processes train one model together.

    The defaults are those of one process that trains alone.

    [Note: the route] Under a strategy that declares ``intercepts_forward``, the module that ``setup_module`` gets is a
    thin route around the user's module: its ``forward(name, *args, **kwargs)`` runs the user's module, or the method
    ``name`` of it. The user's module is its only child, named ``module``. So a strategy wraps a module as it would
    wrap any other, and every marked method passes through it.
    """

    kind = "strategy"

    capabilities: ClassVar[StrategyCapabilities] = StrategyCapabilities()
    """What the strategy declares."""

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
    def connect(self, world: World, policy: PrecisionPolicy) -> None:
        """Join the other processes; called once, before anything else but ``capabilities``.

        Args:
            world: Who this process is.
            policy: What the precision asks for; a strategy that declares ``applies_mixed_precision`` carries it out.
        """

    @behaviour
    def teardown(self) -> None:
        """Leave the other processes and give back all that was taken. May be called again, and without ``connect``."""

    @behaviour
    def init_module(self, empty: bool) -> AbstractContextManager[Any]:
        """Give the context in which a model is made.

        Args:
            empty: Leave the parameters' memory unset where that is possible, because a checkpoint will fill it. Here
                the functions of ``torch.nn.init`` that can be stepped over leave their tensors as they are.
        """
        return _Undrawn() if empty else nullcontext()

    @behaviour
    def setup_module(self, module: nn.Module) -> nn.Module:
        """Wrap or shard a module.

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
    def backward(self, loss: torch.Tensor, arguments: Mapping[str, Any]) -> None:
        """Run the backward pass.

        Args:
            loss: What to differentiate, already scaled.
            arguments: Keyword arguments of ``torch.Tensor.backward``.
        """
        loss.backward(**arguments)  # type: ignore[no-untyped-call]

    @behaviour
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step an optimizer, and return what its ``step`` returns."""
        return optimizer.step() if closure is None else optimizer.step(closure)

    @behaviour
    def no_backward_sync(
        self,
        module: nn.Module,
        enabled: bool,
    ) -> AbstractContextManager[Any]:
        """Give the context in which backward passes leave each rank's gradients apart.

        Args:
            module: What ``setup_module`` returned.
            enabled: Whether to leave them apart; otherwise the context changes nothing.
        """
        return nullcontext()

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
        """Clip every gradient's elements into ``[-clip_value, clip_value]``."""
        nn.utils.clip_grad_value_(parameters, clip_value)

    @behaviour
    def data_shard(self) -> tuple[int, int]:
        """Say which part of the data this process reads: its index, and the number of parts."""
        return 0, 1

    @behaviour
    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        """Reduce a tensor over the ranks.

        Args:
            tensor: The tensor of this rank, of the same shape and type on every rank; left as it is.
            group: A process group; ``None`` is all ranks.
            reduce_op: ``"sum"``, ``"mean"``, ``"max"``, ``"min"``, ``"product"``.

        Returns:
            A new tensor of the same shape and type, through which no gradient flows.

        Raises:
            RequestError: There is no such operation.
        """
        check_reduction(reduce_op)
        return tensor.detach().clone()

    @behaviour
    def all_gather(
        self,
        tensor: torch.Tensor,
        group: Any | None,
        sync_grads: bool,
    ) -> list[torch.Tensor]:
        """Gather the tensors of all ranks.

        Args:
            tensor: The tensor of this rank; shapes may differ between ranks, types and dimensions may not.
            group: A process group; ``None`` is all ranks.
            sync_grads: Let gradients flow back to the rank that a tensor came from.

        Returns:
            New tensors, in the order of the ranks.
        """
        return [tensor.clone() if sync_grads else tensor.detach().clone()]

    @behaviour
    def broadcast(self, obj: Any, src: int) -> Any:
        """Give every rank the object of one.

        Args:
            obj: Any picklable object on the rank ``src``; ignored on the others.
            src: The global rank that it comes from.

        Raises:
            RequestError: There is no such rank.
        """
        check_source(src, 1)
        return obj

    @behaviour
    def barrier(self, name: str | None) -> None:
        """Wait until every rank is here; the name is for messages."""

    @behaviour
    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        """Give a module's state, under the bare module's names.

        Args:
            module: The user's module, after ``setup_module``.
            full: Whole tensors on the CPU on rank 0 (other ranks may get an empty dict); else each rank's own part.
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
        """Load what ``optimizer_state`` gave, saved under any strategy or world size."""
        optimizer.load_state_dict(dict(state))


class _Undrawn(TorchFunctionMode):
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


def check_reduction(reduce_op: Any) -> str:
    """Give an operation's name in lower case.

    Raises:
        RequestError: There is no such operation.
    """
    name = str(reduce_op).lower()
    if name not in _REDUCTIONS:
        raise RequestError(
            "there is no such reduction",
            where="all_reduce(reduce_op=)",
            got=repr(reduce_op),
            instead=", ".join(_REDUCTIONS),
        )
    return name


def check_source(src: int, world_size: int) -> None:
    """Refuse a rank that there isn't.

    Raises:
        RequestError: There is no such rank.
    """
    if not 0 <= src < world_size:
        raise RequestError(
            "there is no such rank",
            where="broadcast(src=)",
            got=repr(src),
            instead=f"a rank from 0 to {world_size - 1}",
        )


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
