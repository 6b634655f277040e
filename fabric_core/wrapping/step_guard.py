"""Checks each step of an optimizer that holds a ``Fabric``'s gradients, also where it is called directly."""

import threading
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fabric_core.errors import MisuseError
from fabric_core.wrapping.added import Added
from fabric_core.wrapping.backward_guard import BackwardGuard
from fabric_core.wrapping.gradient_sync import GradientSync
from fabric_core.wrapping.notes import held_by

__all__ = ["StepGuard"]

Closure = Callable[[], Any]
Step = Callable[[Closure | None], Any]


class StepGuard:
    """Goes round the steps of wrapped optimizers, and before those of all others, by a hook of PyTorch's own.

    Args:
        sync: Knows which gradients were not averaged.
        backward: Knows which gradients are scaled.
        sharded: What was set up, where the strategy must prepare each step on its shards.
        added: Knows what was put into models after setup, where a strategy averages or shards what was there.
        cleared: Told of the parameters whose gradients were cleared, where the strategy shards.
    """

    def __init__(
        self,
        sync: GradientSync | None,
        backward: BackwardGuard | None,
        sharded: Iterable[Any] | None,
        added: Added | None,
        cleared: Callable[[list[torch.Tensor]], None] | None,
    ) -> None:
        self._sync = sync
        self._backward = backward
        self._sharded = sharded
        self._added = added
        self._cleared = cleared
        self._stepping = threading.local()
        self._handle: Any = None

    @property
    def opened(self) -> bool:
        """Whether every optimizer is watched."""
        return self._handle is not None

    def open(self) -> Callable[[], None]:
        """Watch every optimizer of the process until ``close``; returns a function that ends it without this object."""
        if self._handle is None:
            method = WeakMethod(self._before)

            def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
                check = method()
                return None if check is None else check(optimizer, args, kwargs)

            self._handle = register_optimizer_step_pre_hook(before)
        remove: Callable[[], None] = self._handle.remove
        return remove

    def close(self) -> None:
        """Watch no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def around(self, step: Step, optimizer: Optimizer) -> Step:
        """Check the steps of a wrapped optimizer, and let the original's own through."""
        stepping = self._stepping

        def checked(closure: Closure | None) -> Any:
            if self._added is not None:
                self._added.check(optimizer)
            if closure is not None:
                closure = self._closure(closure, optimizer)
            elif self._sync is not None:
                self._sync.check(optimizer)
            before = getattr(stepping, "now", False)
            stepping.now = True
            try:
                return step(closure)
            finally:
                stepping.now = before

        return checked

    def forget(self, optimizer: Optimizer | None, module: nn.Module | None = None) -> None:
        """Take note that the gradients of an optimizer, or of a model, were cleared."""
        if self._sync is not None:
            self._sync.forget(optimizer, module)
        if self._backward is not None:
            self._backward.forget(optimizer, module)
        if self._cleared is not None:
            groups = [] if optimizer is None else optimizer.param_groups
            own = [] if module is None else list(module.parameters())
            self._cleared([*own, *(one for group in groups for one in group["params"])])

    def _closure(self, closure: Closure, optimizer: Optimizer) -> Closure:
        """Check after each evaluation; what is in it is the user's, and no part of the step."""
        stepping = self._stepping

        def evaluated() -> Any:
            before = getattr(stepping, "now", False)
            stepping.now = False
            try:
                loss = closure()
            finally:
                stepping.now = before
            if self._sync is not None:
                self._sync.check(optimizer)
            return loss

        return evaluated

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at the step of an optimizer that is called directly.

        Raises:
            MisuseError: It would step on gradients that are scaled, not averaged, or whose shards aren't prepared.
        """
        if getattr(self._stepping, "now", False):
            return None
        self._check_raw(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None

        def evaluated() -> Any:
            loss = closure()
            self._check_raw(optimizer)
            return loss

        return ((args[0], evaluated, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": evaluated})

    def _check_raw(self, optimizer: Optimizer) -> None:
        scaled = None if self._backward is None else self._backward.scaled(optimizer)
        if scaled is not None:
            raise _direct(optimizer, "the precision scales the loss, so the gradients are too large", scaled)
        if self._sharded is not None:
            known = [one for key in self._sharded if isinstance(key, nn.Module) for one in key.named_parameters()]
            held = held_by(optimizer)
            there = [name for name, one in known if id(one) in held]
            if there:
                raise _direct(optimizer, "the strategy prepares the shards for each step", ", ".join(there[:4]))
        if self._added is not None:
            self._added.check(optimizer)
        if self._sync is not None:
            self._sync.check(optimizer)


def _direct(optimizer: Optimizer, why: str, names: str) -> MisuseError:
    kind = type(optimizer).__name__
    return MisuseError(
        f"the optimizer was called directly, and {why}",
        where=f"{kind}.step, which holds {names}",
        got=f"the step of {kind} itself",
        instead="optimizer.step() of the optimizer that fabric.setup(model, optimizer) returned",
    )
