"""The contract of a precision: the number types of training."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core._torch import apply_to_tensors
from fabric_core.collectives import Collectives
from fabric_core.contracts._default_dtype import DefaultDtype
from fabric_core.contracts._spec import Plugin
from fabric_core.contracts._tree import map_tree
from fabric_core.contracts.capabilities import PrecisionCapabilities
from fabric_core.markers import behaviour

__all__ = ["Precision", "PrecisionPolicy"]


@dataclass(frozen=True, kw_only=True)
class PrecisionPolicy:
    """What a precision asks for, as data that any strategy can carry out.

    Args:
        param_dtype: The type that parameters are kept in; ``None`` leaves them as they are.
        compute_dtype: The type of the matrix work of forward and backward; ``None`` leaves it to the operators.
        reduce_dtype: The type in which gradients are reduced over the ranks; ``None`` is the gradients' own. A strategy
            that declares ``applies_mixed_precision`` carries it out; under any other one gradients are reduced in
            their own type, which is their parameters', so that it must be no wider than that.
        input_dtype: The type that floating-point inputs of ``forward`` are converted to; ``None`` leaves them, under
            every strategy.
        output_dtype: The type that floating-point outputs of ``forward`` are converted to; ``None`` leaves them.
        autocast: ``forward_context`` does nothing but autocast to ``compute_dtype``, so a strategy that carries compute
            types itself may take its place, if it converts inputs; those that stay as they are need autocast beside it.
        loss_scaling: The loss is scaled, and gradients must be unscaled before they are looked at. The scale may change
            from step to step or stay what it is: a static scale is right too.
    """

    param_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    input_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    autocast: bool = False
    loss_scaling: bool = False


class Precision(Plugin, ABC):
    """The number types of training: a policy that any strategy can carry out, and the acts where none does.

    A strategy never asks which class a precision is, nor the other way round.
    """

    kind = "precision"

    capabilities: ClassVar[PrecisionCapabilities] = PrecisionCapabilities()
    """What the precision declares, apart from its policy."""

    @property
    @abstractmethod
    def policy(self) -> PrecisionPolicy:
        """What the precision asks for. The same for the life of the object."""

    @behaviour
    def connect(self, collectives: Collectives) -> None:
        """Receive the collectives; called once, after the strategy has connected.

        Args:
            collectives: For what the ranks must decide together, such as whether a gradient overflowed on any of them.
        """

    @behaviour
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert a module's parameters and buffers, in place where possible, before it is moved or sharded.

        Unless it is overridden, it converts the floating-point ones to ``param_dtype``; complex ones stay complex.
        """
        dtype = self.policy.param_dtype
        if dtype is not None:
            apply_to_tensors(module, lambda one: one.to(dtype) if one.is_floating_point() else one)
        return module

    @behaviour
    def convert_input(self, data: Any) -> Any:
        """Convert the floating-point tensors in the inputs of ``forward``.

        Args:
            data: The positional and the keyword arguments, as ``(args, kwargs)``, or one nested value.

        Returns:
            The same structure; the very same object where nothing in it had to change.
        """
        return convert_tensors(data, self.policy.input_dtype)

    @behaviour
    def convert_output(self, data: Any) -> Any:
        """Convert the floating-point tensors in what ``forward`` returned; unchanged, it is the very same object."""
        return convert_tensors(data, self.policy.output_dtype)

    @behaviour
    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        """Give a new context for one run of ``forward``; ``None`` where none is needed, always or never."""
        return None

    @behaviour
    def backward_context(self) -> AbstractContextManager[Any] | None:
        """Give a new context for one run of ``fabric.backward``; ``None`` where none is needed.

        It is for parts of ``forward`` that a backward pass runs again, as with activation checkpointing. Autocast needs
        none: PyTorch restores it there.
        """
        return None

    @behaviour
    def init_context(self) -> AbstractContextManager[Any] | None:
        """Give a new context for making parameters and tensors in the policy's type; ``None`` where none is needed.

        Unless it is overridden, it follows from the policy: inside, what makes floating-point tensors of PyTorch's
        default type makes them in ``param_dtype``, in this thread; without a ``param_dtype`` there is no context.
        """
        dtype = self.policy.param_dtype
        return None if dtype is None else DefaultDtype(dtype)

    @behaviour
    def setup_optimizer(self, optimizer: Optimizer) -> None:
        """Take note of an optimizer that was set up; it is the object that later calls name."""

    @behaviour
    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Scale a loss before ``backward``.

        Its gradients are added to those that wait for a step, of any optimizer that was set up: where the scale is
        another one by now, or they were unscaled, they are rescaled to this loss's scale first.
        """
        return loss

    @behaviour
    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Unscale the gradients of an optimizer's parameters; a second call in a step is harmless."""

    @behaviour
    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        """Decide whether and how an optimizer steps.

        Args:
            optimizer: The optimizer whose step this is.
            step: Performs the strategy's step; it takes the closure, or ``None``.
            closure: The user's closure, which runs forward and backward and returns the loss; ``None`` without one. It
                is evaluated with gradients enabled, as PyTorch's optimizers do, whatever mode the caller is in.

        Returns:
            What ``step`` returned, or ``None`` where the step was skipped. With ``loss_scaling`` a step whose gradients
            are not finite, on any rank, is skipped on all, and the scale does not grow by it; also where clipping by
            value, after they were unscaled, has made them finite. A step without gradients is none of those.
        """
        return step(closure)

    @behaviour
    def state_dict(self) -> dict[str, Any]:
        """Give what must be saved to continue, such as the loss scale.

        It may hold numbers, booleans, text and ``None``, and lists and dicts of them with text for keys; no tensors.
        """
        return {}

    @behaviour
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, which is left as it is."""


def convert_tensors(data: Any, dtype: torch.dtype | None) -> Any:
    """Convert the floating-point tensors of a nested value; the very same object comes back where nothing changes.

    Integers, booleans and complex numbers are left alone.
    """
    return data if dtype is None else converter(dtype)(data)


def converter(dtype: torch.dtype) -> Callable[[Any], Any]:
    """Give ``convert_tensors`` for one type: made once, it is the faster the more often it is called."""

    def convert(data: Any) -> Any:
        if isinstance(data, torch.Tensor):
            # Types are compared first: `to` takes a microsecond to find that there is nothing to do, half of one more
            # without the keyword.
            return data if data.dtype is dtype or not data.is_floating_point() else data.to(dtype=dtype)
        return map_tree(data, convert)

    return convert


def map_tensors(
    data: Any,
    function: Callable[[torch.Tensor], Any],
    objects: Callable[[Any], Any] | None = None,
) -> Any:
    """Apply a function to every tensor of a nested value.

    Goes into dicts, lists, tuples, named tuples, dataclasses (frozen ones too), subclasses of ``dict`` and of
    ``UserDict``, and containers registered with ``torch.utils._pytree``. What holds no tensor, or whose tensors all
    come back unchanged, is the very same object.

    Args:
        data: The value.
        function: Maps a tensor; returns its argument to leave it.
        objects: Maps an object that is no tensor, number, text, dict, list or tuple; returns its argument to let the
            walk go into it. Without it the walk goes into all it knows.
    """
    return map_tree(data, function, objects)
