"""The wrapped model: the strategy, the precision and the device go round the original, which is otherwise untouched."""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import update_wrapper
from types import FunctionType, MethodType
from typing import Any, Final, cast
from weakref import WeakSet

import torch
from torch import nn

from fabric_core.contracts._spec import warn_of_lost_extensions
from fabric_core.wrapping.forward import Around, Run
from fabric_core.wrapping.method_guard import guarded

__all__ = ["FabricModule", "first_device", "strategy_module"]

_STEPS: Final = ("training_step", "validation_step", "test_step", "predict_step")
"""Methods that count as marked where they exist."""


class FabricModule(nn.Module):
    """A model that was set up: call it as the original; everything else is the original's.

    Its own are ``module`` (the original), ``device`` and ``mark_forward_method``. A deep copy goes round a deep copy of
    the original; a pickled one comes back without the link to its ``Fabric`` (a raw ``backward`` is not watched).

    Args:
        original: The user's module.
        called: What runs for ``forward``: what wrappers and compilation made of ``inner``.
        inner: What the strategy made of the module, or of a route to it.
        routed: It is a route.
        around: What goes round every run.
        device: The device that it is on.
        marked: The names of the marked methods.
    """

    _fabric_original: nn.Module
    _fabric_called: nn.Module
    _fabric_inner: nn.Module
    _fabric_routed: bool
    _fabric_around: Around
    _fabric_device: torch.device
    _fabric_marked: set[str]
    _fabric_bound: Callable[[Run], Run]
    _fabric_run: Run
    _fabric_methods: dict[str, Run]
    _fabric_members: WeakSet[nn.Module]

    def __init__(
        self,
        original: nn.Module,
        called: nn.Module,
        *,
        inner: nn.Module,
        routed: bool,
        around: Around,
        device: torch.device,
        marked: frozenset[str] = frozenset(),
    ) -> None:
        # Not `nn.Module.__init__`: without parameters, hooks and children of its own, it has those of the original.
        self.__dict__.update(
            _fabric_original=original,
            _fabric_called=called,
            _fabric_inner=inner,
            _fabric_routed=routed,
            _fabric_around=around,
            _fabric_marked={name for name in _STEPS if callable(getattr(original, name, None))} | marked,
            _fabric_methods={},
            # Only a route needs to know them; found once, so that a guard costs the same for any number of them.
            _fabric_members=WeakSet(original.modules() if routed else ()),
        )
        self._fabric_move(device)

    def _fabric_move(self, device: torch.device) -> None:
        """Take another device, for which contexts are chosen anew."""
        called = self._fabric_called
        bound = self._fabric_around.bind(self._fabric_original, self._fabric_inner, device)
        run = bound(_routed(called, "forward") if self._fabric_routed else called)
        self.__dict__.update(_fabric_device=device, _fabric_bound=bound, _fabric_run=run)
        self._fabric_methods.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model through precision and strategy; the same as ``forward``."""
        return self._fabric_run(*args, **kwargs)

    @property
    def forward(self) -> Run:  # type: ignore[override]
        """Run the model through precision and strategy, with the original's signature."""
        return self._fabric_method("forward", self._fabric_original.forward)

    @property
    def module(self) -> nn.Module:
        """The original module, the very object that was set up."""
        return self._fabric_original

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self._fabric_device

    def mark_forward_method(self, method: Run | str) -> None:
        """Let a method other than ``forward`` run the model through precision and strategy.

        Args:
            method: The method, or its name.

        Raises:
            ValueError: It is ``forward``, which needs no mark.
            AttributeError: The model has no method of that name.
            TypeError: It is neither a method of the model nor a name, or one that runs piece by piece: a generator or a
                coroutine.
        """
        original = self._fabric_original
        kind = type(original).__name__
        given = method if isinstance(method, str) else getattr(method, "_fabric_wraps", method)
        name = given if isinstance(given, str) else getattr(given, "__name__", None)
        if name == "forward":
            raise ValueError(f"{kind}.forward needs no mark: it always passes through the strategy")
        if not isinstance(given, str | MethodType) or not isinstance(name, str):
            raise TypeError(f"mark_forward_method takes a method of {kind} or its name, and got {method!r}")
        if not hasattr(original, name):
            raise AttributeError(f"{kind} has no method {name!r} to mark")
        found = getattr(original, name)
        if not isinstance(found, MethodType):
            raise AttributeError(f"{kind}.{name} is no method but of the type {type(found).__name__}")  # noqa: TRY004
        if isinstance(given, MethodType) and given != found:
            raise TypeError(f"{given!r} is no method of this {kind}; give one of its own, or the name {name!r}")
        if inspect.isgeneratorfunction(found) or inspect.iscoroutinefunction(found):
            raise TypeError(f"{kind}.{name} can't be marked: it goes on running after the strategy's forward has ended")
        self._fabric_marked.add(name)
        self._fabric_methods.pop(name, None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the original's gradients, and what is known of them."""
        self._fabric_original.zero_grad(set_to_none)
        steps = self._fabric_around.steps
        if steps is not None:
            steps.forget(None, self._fabric_original)

    def _fabric_method(self, name: str, method: Any) -> Run:
        """Give what stands for a bound method of the original: routed, guarded, or the method itself."""
        cached = self._fabric_methods.get(name)
        if cached is not None and cached._fabric_wraps == method:  # type: ignore[attr-defined] # noqa: SLF001
            return cached
        original, inner, routed = self._fabric_original, self._fabric_inner, self._fabric_routed
        if name == "forward":
            run = _renamed(self._fabric_run, method)
        elif getattr(method, "__self__", None) is not original:
            return cast("Run", method)
        elif name in self._fabric_marked:
            run = _renamed(self._fabric_bound(_routed(inner, name) if routed else method), method)
        elif routed and not hasattr(nn.Module, name):
            run = _renamed(guarded(method, self._fabric_members), method)
        else:
            return cast("Run", method)
        run._fabric_wraps = method  # type: ignore[attr-defined] # noqa: SLF001
        self._fabric_methods[name] = run
        return run

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._fabric_original, name)
        return self._fabric_method(name, value) if type(value) is MethodType else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            raise AttributeError(
                f"{name!r} is the wrapper's own and can't be set; the original's is model.module.{name}"
            )
        setattr(self._fabric_original, name, value)

    def __delattr__(self, name: str) -> None:
        if name in _OWN:
            raise AttributeError(f"{name!r} is the wrapper's own and can't be deleted")
        delattr(self._fabric_original, name)

    def __dir__(self) -> list[str]:
        """Name the original's attributes and the wrapper's own."""
        return sorted({*dir(self._fabric_original), *_OWN})

    def __repr__(self) -> str:
        """Show the original."""
        return repr(self._fabric_original)

    def __copy__(self) -> "FabricModule":
        """Go round the same original once more."""
        return _rebuild(*self._fabric_parts())

    def __deepcopy__(self, memo: dict[int, Any]) -> "FabricModule":
        """Go round a deep copy of the original, with the same precision."""
        modules, given = self._fabric_parts()
        clone = _rebuild(copy.deepcopy(modules, memo), given)
        memo[id(self)] = clone
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all but the link to the ``Fabric`` and extensions, which stay in their process."""
        modules, given = self._fabric_parts()
        around: Around = given["around"]
        warn_of_lost_extensions("a model", around.precision, *around.wrappers)
        return _rebuild, (modules, {**given, "around": replace(around, guard=None, sync=None, steps=None)})

    def _fabric_parts(self) -> tuple[tuple[nn.Module, nn.Module, nn.Module], dict[str, Any]]:
        given = {
            "routed": self._fabric_routed,
            "around": self._fabric_around,
            "device": self._fabric_device,
            "marked": frozenset(self._fabric_marked),
        }
        return (self._fabric_original, self._fabric_called, self._fabric_inner), given

    def __len__(self) -> int:
        """Give the original's length."""
        return len(self._fabric_original)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the original."""
        return iter(self._fabric_original)  # type: ignore[call-overload, no-any-return]

    def __getitem__(self, index: Any) -> Any:
        """Index the original."""
        return self._fabric_original[index]  # type: ignore[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        """Set an item of the original."""
        self._fabric_original[index] = value  # type: ignore[operator]

    def __delitem__(self, index: Any) -> None:
        """Delete an item of the original."""
        del self._fabric_original[index]  # type: ignore[operator]

    def __contains__(self, item: object) -> bool:
        """Look into the original."""
        return item in self._fabric_original  # type: ignore[operator]

    def __bool__(self) -> bool:
        """Be as true as the original."""
        return bool(self._fabric_original)


_OWN: Final = frozenset({"module", "device", "mark_forward_method"})
"""What a wrapped model has of its own, beside the original's."""


def _rebuild(modules: tuple[nn.Module, nn.Module, nn.Module], given: dict[str, Any]) -> FabricModule:
    original, called, inner = modules
    return FabricModule(original, called, inner=inner, **given)


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: FabricModule, *args: Any, **kwargs: Any) -> Any:
        original = self._fabric_original
        before = first_device(original)
        result = getattr(original, name)(*args, **kwargs)
        if result is not original:
            return result
        after = first_device(original)
        if after is not None and after != before:
            self._fabric_move(after)
        return self

    return update_wrapper(method, getattr(nn.Module, name))


def first_device(module: nn.Module) -> torch.device | None:
    """Give the device of a module's first parameter, if it has any."""
    return next((parameter.device for parameter in module.parameters()), None)


# nn.Module's own methods would be found on the wrapper, before `__getattr__` is asked.
for _name, _value in list(vars(nn.Module).items()):
    if isinstance(_value, FunctionType) and not _name.startswith("__") and _name not in vars(FabricModule):
        setattr(FabricModule, _name, _delegate(_name))


def _routed(route: nn.Module, name: str) -> Run:
    """Run a method through the strategy."""

    def routed(*args: Any, **kwargs: Any) -> Any:
        return route(name, *args, **kwargs)

    return routed


def _renamed(run: Run, method: Run) -> Run:
    """Give a run the name, documentation and signature of the method that it stands for."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    return update_wrapper(stand_in, method)


def strategy_module(module: FabricModule) -> nn.Module:
    """Give what the strategy made of a model."""
    return module._fabric_inner  # noqa: SLF001 - the wrapper's own file
