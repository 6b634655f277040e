"""The wrapped model: the strategy, the precision and the device go round the original, which is otherwise untouched."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import update_wrapper
from types import FunctionType, MethodType
from typing import Any, Final, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fabric_core.contracts import Precision, Strategy
from fabric_core.errors import MisuseError

__all__ = ["FabricModule", "Route"]

_STEPS: Final = ("training_step", "validation_step", "test_step", "predict_step")
"""Methods that count as marked where they exist."""


class Route(nn.Module):
    """What a strategy wraps in place of the user's module, so that other methods than ``forward`` pass through it too.

    ``route("forward", x)`` is ``module(x)``, and ``route("generate", x)`` is ``module.generate(x)``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run the module, or a method of it."""
        if method == "forward":
            return self.module(*args, **kwargs)
        return getattr(self.module, method)(*args, **kwargs)


class FabricModule(nn.Module):
    """A model that was set up: call it as the original; everything else is the original's.

    Args:
        original: The user's module.
        called: What the strategy made of it, or of the route to it.
        strategy: The bound strategy.
        precision: The bound precision.
        device: The device that it is on.
        contexts: Each makes a context for one run of ``forward``.
    """

    def __init__(
        self,
        original: nn.Module,
        called: nn.Module,
        *,
        strategy: Strategy,
        precision: Precision,
        device: torch.device,
        contexts: tuple[Callable[[], AbstractContextManager[Any] | None], ...] = (),
    ) -> None:
        # Not `nn.Module.__init__`: without parameters, hooks and children of its own, it has those of the original.
        routed = strategy.capabilities.wraps_forward
        set_ = cast("dict[str, Any]", object.__getattribute__(self, "__dict__"))
        set_["_fabric_original"] = original
        set_["_fabric_called"] = called
        set_["_fabric_device"] = device
        set_["_fabric_routed"] = routed
        set_["_fabric_marked"] = {name for name in _STEPS if callable(getattr(original, name, None))}
        set_["_fabric_around"] = _around(strategy, precision, device, contexts)
        run = set_["_fabric_around"]
        set_["forward"] = run(_Forward(called) if routed else called)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model through precision and strategy; the same as ``forward``."""
        return self.__dict__["forward"](*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        """The original module, the very object that was set up."""
        return cast("nn.Module", self.__dict__["_fabric_original"])

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return cast("torch.device", self.__dict__["_fabric_device"])

    def mark_forward_method(self, method: Callable[..., Any] | str) -> None:
        """Let a method other than ``forward`` run the model through precision and strategy.

        Args:
            method: The method, or its name.

        Raises:
            ValueError: It is ``forward``, which needs no mark.
            AttributeError: The model has nothing of that name.
            TypeError: What it has is no method.
        """
        name = method if isinstance(method, str) else getattr(method, "__name__", None)
        original = self.module
        kind = type(original).__name__
        if name == "forward":
            raise ValueError("forward needs no mark: it always passes through the strategy")
        if not isinstance(name, str):
            raise TypeError(f"mark_forward_method takes a method of {kind} or its name, and got {method!r}")
        if not hasattr(original, name):
            raise AttributeError(f"{kind} has no method {name!r} to mark")
        if not isinstance(getattr(original, name), MethodType):
            raise TypeError(f"{kind}.{name} is no method but {type(getattr(original, name)).__name__}")
        self.__dict__["_fabric_marked"].add(name)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        original = own["_fabric_original"]
        value = getattr(original, name)
        if isinstance(value, MethodType) and value.__self__ is original:
            if name in own["_fabric_marked"]:
                return own["_fabric_around"](_Method(own["_fabric_called"], value, routed=own["_fabric_routed"]))
            if own["_fabric_routed"] and not hasattr(nn.Module, name):
                return _guarded(value, cast("nn.Module", original))
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_fabric_original"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_fabric_original"], name)

    def __dir__(self) -> list[str]:
        """Name the original's attributes and the wrapper's own."""
        return sorted({*dir(self.__dict__["_fabric_original"]), *vars(FabricModule)})

    def __repr__(self) -> str:
        """Show the original."""
        return f"FabricModule({self.__dict__['_fabric_original']!r})"

    def __len__(self) -> int:
        """Give the original's length."""
        return len(self.__dict__["_fabric_original"])

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the original."""
        return iter(self.__dict__["_fabric_original"])

    def __getitem__(self, index: Any) -> Any:
        """Index the original."""
        return self.__dict__["_fabric_original"][index]

    def __contains__(self, item: object) -> bool:
        """Look into the original."""
        return item in self.__dict__["_fabric_original"]

    def __bool__(self) -> bool:
        """Be true as every module is, although it has a length."""
        return bool(self.__dict__["_fabric_original"])


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: FabricModule, *args: Any, **kwargs: Any) -> Any:
        original = self.__dict__["_fabric_original"]
        result = getattr(original, name)(*args, **kwargs)
        return self if result is original else result

    return update_wrapper(method, getattr(nn.Module, name))


for _name, _value in list(vars(nn.Module).items()):
    if isinstance(_value, FunctionType) and not _name.startswith("__") and _name not in vars(FabricModule):
        setattr(FabricModule, _name, _delegate(_name))


class _Forward:
    """Calls the route's forward."""

    def __init__(self, called: nn.Module) -> None:
        self._called = called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called("forward", *args, **kwargs)


class _Method:
    """Calls a marked method, through the route where there is one."""

    def __init__(self, called: nn.Module, method: MethodType, *, routed: bool) -> None:
        self._called = called
        self._method = method
        self._routed = routed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._routed:
            return self._called(self._method.__name__, *args, **kwargs)
        return self._method(*args, **kwargs)


def _around(
    strategy: Strategy,
    precision: Precision,
    device: torch.device,
    contexts: tuple[Callable[[], AbstractContextManager[Any] | None], ...],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Build what goes round every run of the model, and leave out what does nothing."""
    policy = precision.policy
    carried = strategy.capabilities.carries_policy and policy.autocast
    makers = list(contexts)
    if not carried and precision.forward_context(device.type) is not None:
        makers.insert(0, lambda: precision.forward_context(device.type))

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        if not makers and policy.input_dtype is None and policy.output_dtype is None:
            return function

        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = precision.convert_input((args, kwargs))
            with ExitStack() as stack:
                for make in makers:
                    context = make()
                    if context is not None:
                        stack.enter_context(context)
                result = function(*args, **kwargs)
            return precision.convert_output(result)

        return run

    return wrap


def _guarded(method: MethodType, original: nn.Module) -> Callable[..., Any]:
    """Let a method run as long as it reaches no submodule: one that does must be marked."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        thread = threading.get_ident()

        def refuse(module: nn.Module, _inputs: Any) -> None:
            if threading.get_ident() == thread and any(module is own for own in original.modules()):
                kind, name = type(original).__name__, method.__name__
                raise MisuseError(
                    f"{kind}.{name} runs the model past the strategy, which would not synchronise it",
                    where=f"{kind}.{name}, at its submodule {type(module).__name__}",
                    instead=f"mark it once after setup: model.mark_forward_method({name!r})",
                )

        handle = register_module_forward_pre_hook(refuse)
        try:
            return method(*args, **kwargs)
        finally:
            handle.remove()

    return update_wrapper(guarded, method)
