"""An extension that names the first module whose output or gradient is not finite."""

import weakref
from collections.abc import Callable, Generator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fabric_core import around, hookimpl
from fabric_core.contracts import PrecisionPolicy
from fabric_core.errors import FabricError


class NotFiniteError(FabricError, ArithmeticError):
    """A number is infinite or no number; ``module`` names where, and ``what`` says what it belongs to."""


class NaNGuard:
    """Raises ``NotFiniteError`` where the first number that is not finite comes up in a model that was set up.

    It attaches nothing to the models, so that they copy and pickle as before.
    """

    def __init__(self) -> None:
        self._names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._parameters = WeakIdKeyDictionary()
        self._users = WeakIdKeyDictionary()  # of each module's output: the modules that it is given to
        self._gradients = True
        self._stop: Callable[[], object] | None = None

    @around.strategy
    def connect(self, policy: PrecisionPolicy) -> Generator[None, Any, Any]:
        """Leave gradients out where the precision handles their overflows."""
        self._gradients = not policy.loss_scaling
        return (yield)

    @hookimpl
    def module_set_up(self, module: nn.Module) -> None:
        """Watch a model."""
        bare: Any = getattr(module, "module", module)
        for name, one in bare.named_modules():
            self._names[one] = f"{name or 'the model itself'} ({type(one).__name__})"
        for name, parameter in bare.named_parameters():
            self._parameters[parameter] = name
        if self._stop is None:
            # PyTorch's hook for all modules; weak, so that it ends with whoever holds this object.
            handle = register_module_forward_hook(partial(_look, weakref.ref(self)), with_kwargs=True)
            self._stop = weakref.finalize(self, handle.remove)

    @hookimpl
    def torn_down(self) -> None:
        """Watch no more."""
        if self._stop is not None:
            self._stop()
            self._stop = None

    def check(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Look at what a module made, now and at its gradient in the backward pass."""
        name = self._names.get(module)
        if name is None:
            return
        given = _tensors(inputs)
        for tensor in given:
            if tensor in self._users:
                self._users[tensor].append(name)
        for tensor in _tensors(outputs):
            if not _finite(tensor):
                already = not all(_finite(one) for one in given)
                raise NotFiniteError(
                    f"the output of {name} is not finite" + (", and its input was not" if already else ""),
                    where="forward",
                    got=_shown(tensor),
                    instead="look at what was given to it" if already else "look at its computation and parameters",
                    module=name,
                )
            if self._gradients and tensor.requires_grad and tensor not in self._users:
                users = self._users[tensor] = []
                tensor.register_hook(partial(self._look_at_gradient, name, users))  # type: ignore[no-untyped-call]

    def _look_at_gradient(self, name: str, users: list[str], gradient: torch.Tensor) -> None:
        if _finite(gradient):
            return
        raise NotFiniteError(
            f"the gradient that came back from {users[0]} is not finite"
            if users
            else f"the gradient of the output of {name} is not finite, and no other module uses that output",
            where=f"backward, at the output of {name}",
            got=_shown(gradient),
            instead=f"look at the derivative of {users[0] if users else 'the loss, or of what its parent computes'}",
            module=users[0] if users else name,
        )

    @around.strategy
    def optimizer_step(self, optimizer: Optimizer) -> Generator[None, Any, Any]:
        """Look at the gradients that it would step on."""
        for group in optimizer.param_groups if self._gradients else ():
            for parameter in group["params"]:
                if parameter.grad is not None and not _finite(parameter.grad):
                    name = self._parameters.get(parameter, "a parameter that was not set up")  # type: ignore[no-untyped-call]
                    raise NotFiniteError(
                        f"the gradient of the parameter {name} is not finite",
                        where=f"{type(optimizer).__name__}.step",
                        got=_shown(parameter.grad),
                        instead="look at the computation that uses it",
                        module=name,
                    )
        return (yield)


def _look(guard: Callable[[], NaNGuard | None], module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
    found = guard()
    if found is not None and not torch.compiler.is_compiling():
        found.check(module, (args, kwargs), outputs)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor) and one.is_floating_point()]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Give this rank's part of a tensor that is divided over ranks, without communicating."""
    to_local: Callable[[], torch.Tensor] | None = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(_local(tensor)).all())


def _shown(tensor: torch.Tensor) -> str:
    part = _local(tensor)
    bad = int((~torch.isfinite(part)).sum())
    return f"{bad} of {part.numel()} numbers, in a {part.dtype} of shape {tuple(part.shape)}"
