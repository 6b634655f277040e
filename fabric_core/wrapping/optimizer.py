"""The wrapped optimizer: its step passes through strategy and precision."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch.optim import Optimizer

from fabric_core.contracts import Precision, Strategy

__all__ = ["FabricOptimizer"]


class FabricOptimizer:
    """An optimizer that was set up. Everything but ``step`` is the original's.

    It is made by ``wrap_optimizer``, as an instance of the original's class too.
    """

    _fabric_inner: Optimizer
    _fabric_strategy: Strategy
    _fabric_precision: Precision

    @property
    def optimizer(self) -> Optimizer:
        """The original optimizer."""
        return cast("Optimizer", self.__dict__["_fabric_inner"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step through precision and strategy; returns what the original's does, or ``None`` if skipped."""
        own = self.__dict__
        inner, strategy = own["_fabric_inner"], own["_fabric_strategy"]
        return own["_fabric_precision"].optimizer_step(inner, partial(strategy.optimizer_step, inner), closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_fabric_inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_fabric_inner"], name, value)

    def __repr__(self) -> str:
        """Show the original."""
        return f"FabricOptimizer({self.__dict__['_fabric_inner']!r})"


def wrap_optimizer(optimizer: Optimizer, strategy: Strategy, precision: Precision) -> FabricOptimizer:
    """Wrap an optimizer that the strategy has made ready."""
    kind = type(optimizer)
    names = {name for base in kind.__mro__ for name in vars(base) if not name.startswith("__")}
    methods = {
        name: _delegate(name)
        for name in names
        if name != "step" and callable(getattr(kind, name, None)) and name not in vars(FabricOptimizer)
    }
    cls = type(f"Fabric{kind.__name__}", (FabricOptimizer, kind), methods)
    wrapped = cast("FabricOptimizer", object.__new__(cls))
    wrapped.__dict__.update(_fabric_inner=optimizer, _fabric_strategy=strategy, _fabric_precision=precision)
    return wrapped


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: FabricOptimizer, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.__dict__["_fabric_inner"], name)(*args, **kwargs)

    method.__name__ = name
    return method
