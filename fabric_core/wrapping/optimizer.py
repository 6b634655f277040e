"""The wrapped optimizer: its step passes through strategy and precision."""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch.optim import Optimizer

from fabric_core.contracts import Precision, Strategy, Wrapper
from fabric_core.contracts._spec import warn_of_lost_extensions
from fabric_core.wrapping.step_guard import StepGuard

__all__ = ["FabricOptimizer", "take_step", "wrap_optimizer"]


class FabricOptimizer:
    """An optimizer that was set up. Everything but ``step`` and ``zero_grad`` is the original's.

    It is made by ``wrap_optimizer``, as an instance of the original's class too.
    """

    _fabric_inner: Optimizer
    _fabric_strategy: Strategy
    _fabric_precision: Precision
    _fabric_guard: StepGuard | None
    _fabric_wrappers: Sequence[Wrapper]
    _fabric_act: Callable[[Any, Callable[[], Any] | None], Any] | None
    _fabric_direct: Callable[[Callable[[], Any] | None], Any]
    _fabric_step: Callable[[Callable[[], Any] | None], Any]

    @property
    def optimizer(self) -> Optimizer:
        """The original optimizer."""
        return self._fabric_inner

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step through precision and strategy; returns what the original's does, or ``None`` if skipped."""
        return self._fabric_step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what is known of them."""
        self._fabric_inner.zero_grad(set_to_none)
        if self._fabric_guard is not None:
            self._fabric_guard.forget(self._fabric_inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fabric_inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "step":
            # A scheduler puts a counter round `step`. On the original, it would call itself through this one.
            self.__dict__["step"] = value
        else:
            setattr(self._fabric_inner, name, value)

    def __delattr__(self, name: str) -> None:
        if name == "step":
            del self.__dict__["step"]
        else:
            delattr(self._fabric_inner, name)

    def __dir__(self) -> list[str]:
        """Name the original's attributes and the wrapper's own."""
        return sorted({*dir(self._fabric_inner), "optimizer"})

    def __copy__(self) -> "FabricOptimizer":
        """Go round a shallow copy of the original."""
        inner = copy.copy(self._fabric_inner)
        return wrap_optimizer(
            inner,
            self._fabric_strategy,
            self._fabric_precision,
            self._fabric_guard,
            self._fabric_wrappers,
            self._fabric_act,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "FabricOptimizer":
        """Go round a deep copy of the original, with the same strategy and precision."""
        inner = copy.deepcopy(self._fabric_inner, memo)
        clone = wrap_optimizer(
            inner,
            self._fabric_strategy,
            self._fabric_precision,
            self._fabric_guard,
            self._fabric_wrappers,
            self._fabric_act,
        )
        memo[id(self)] = clone
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the original, and the plugins as they would be made again; a warning names what stays behind."""
        acts = [] if self._fabric_act is None else [inspect.unwrap(self._fabric_act).__self__]
        wrapped = (self._fabric_strategy, self._fabric_precision, *self._fabric_wrappers, *acts)
        warn_of_lost_extensions("an optimizer", *wrapped)
        return wrap_optimizer, (self._fabric_inner, self._fabric_strategy, self._fabric_precision)


def wrap_optimizer(
    optimizer: Optimizer,
    strategy: Strategy,
    precision: Precision,
    guard: StepGuard | None = None,
    wrappers: Sequence[Wrapper] = (),
    act: Callable[[Any, Callable[[], Any] | None], Any] | None = None,
) -> FabricOptimizer:
    """Wrap an optimizer that the strategy has made ready.

    State that it has already goes to where its parameters are now.

    Args:
        optimizer: The optimizer.
        strategy: The bound strategy.
        precision: The bound precision.
        guard: Checks its steps, where that is needed.
        wrappers: The bound wrappers, which are told of its steps.
        act: What a call of its ``step`` goes through first, if anything; it ends in ``take_step``.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            # A scalar, such as the number of steps, stays on the CPU where the optimizer keeps it.
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.device != parameter.device:
                state[name] = value.to(parameter.device)
    precision.setup_optimizer(optimizer)
    kind = type(optimizer)
    names = {name for base in kind.__mro__ for name in vars(base) if not name.startswith("__")}
    methods = {
        name: _delegate(name)
        for name in names
        if callable(getattr(kind, name, None)) and name not in vars(FabricOptimizer)
    }
    cls = type(f"Fabric{kind.__name__}", (FabricOptimizer, kind), methods)
    wrapped = cast("FabricOptimizer", object.__new__(cls))
    step = _step(optimizer, strategy, precision, wrappers)
    wrapped.__dict__.update(
        _fabric_inner=optimizer,
        _fabric_strategy=strategy,
        _fabric_precision=precision,
        _fabric_guard=guard,
        _fabric_wrappers=wrappers,
        _fabric_act=act,
        _fabric_direct=step if guard is None else guard.around(step, optimizer),
    )
    wrapped.__dict__["_fabric_step"] = wrapped._fabric_direct if act is None else partial(act, wrapped)  # noqa: SLF001
    return wrapped


def take_step(wrapped: FabricOptimizer, closure: Callable[[], Any] | None) -> Any:
    """Step through precision and strategy, past whatever goes round a call of ``step``."""
    return wrapped._fabric_direct(closure)  # noqa: SLF001 - this file's own


def _step(
    optimizer: Optimizer, strategy: Strategy, precision: Precision, wrappers: Sequence[Wrapper]
) -> Callable[[Callable[[], Any] | None], Any]:
    """Choose how to step, once: a precision that has nothing to decide is not asked, nor a wrapper that looks away."""
    take, decide = partial(strategy.optimizer_step, optimizer), precision.optimizer_step
    told = [one.after_step for one in wrappers if getattr(one.after_step, "__func__", None) is not Wrapper.after_step]
    if told:
        take = partial(_step_and_tell, take, optimizer, told)
    if getattr(decide, "__func__", None) is Precision.optimizer_step:
        return take
    return partial(decide, optimizer, take)


def _step_and_tell(
    take: Callable[[Callable[[], Any] | None], Any],
    optimizer: Optimizer,
    told: Sequence[Callable[[Optimizer], None]],
    closure: Callable[[], Any] | None,
) -> Any:
    result = take(closure)
    for tell in told:
        tell(optimizer)
    return result


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: FabricOptimizer, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._fabric_inner, name)(*args, **kwargs)

    method.__name__ = name
    return method
