"""The wrapped model: the strategy, the precision and the device go round the original, which is otherwise untouched."""

import copy
import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from types import FrameType, FunctionType, MethodType
from typing import Any, Final, cast
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fabric_core.contracts import Precision, Wrapper, converter
from fabric_core.contracts._spec import warn_of_lost_extensions
from fabric_core.errors import MisuseError
from fabric_core.wrapping.backward_guard import BackwardGuard
from fabric_core.wrapping.gradient_sync import GradientSync
from fabric_core.wrapping.step_guard import StepGuard

__all__ = ["Around", "FabricModule", "Route", "first_device", "strategy_module"]

_STEPS: Final = ("training_step", "validation_step", "test_step", "predict_step")
"""Methods that count as marked where they exist."""

Run = Callable[..., Any]


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


@dataclass(frozen=True, kw_only=True)
class Around:
    """What goes round every run of a model.

    Args:
        precision: The bound precision.
        carried: The strategy carries the precision's types itself, so inputs stay and nothing autocasts.
        wrappers: The bound wrappers, each of which may give a context.
        guard: Refuses a raw ``loss.backward()``, where that is needed.
        sync: Knows which gradients were not averaged, where that is needed.
        steps: Is told when gradients are cleared, where that is needed.
    """

    precision: Precision
    carried: bool = False
    wrappers: tuple[Wrapper, ...] = ()
    guard: BackwardGuard | None = None
    sync: GradientSync | None = None
    steps: StepGuard | None = None

    def bind(self, module: nn.Module, inner: nn.Module, device: torch.device) -> Callable[[Run], Run]:
        """Choose, once, what a run needs; what it doesn't need costs nothing.

        Returns:
            A function that puts it round a run. Where nothing is needed it returns the very same run.
        """
        contexts: list[Callable[[], AbstractContextManager[Any] | None]] = [
            wrapper.forward_context for wrapper in self.wrappers
        ]
        if not self.carried:
            contexts.append(partial(self.precision.forward_context, device.type))
        needed = [make for make in contexts if make() is not None]
        policy = self.precision.policy
        convert_input, kept_in = _conversion(self.precision, "convert_input", policy.input_dtype)
        convert_output, kept_out = _conversion(self.precision, "convert_output", policy.output_dtype)
        if self.carried:
            convert_input = None
        if self.guard is not None:
            self.guard.watch_module(module)
        synchronized = None if self.sync is None else self.sync.watch(module, inner)

        def around(run: Run) -> Run:
            for make in reversed(needed[1:]):
                run = _within(make, run)
            outermost: Callable[[], Any] = needed[0] if needed else nullcontext
            if convert_input is not None or convert_output is not None:
                conversions = (convert_input or _as_it_is, kept_in, convert_output or _as_it_is, kept_out)
                run = _converted(outermost, run, *conversions)
            elif needed:
                run = _within(outermost, run)
            if synchronized is not None:
                run = synchronized.around(run)
            return run if self.guard is None else self.guard.around(run, module, device)

        return around


def _conversion(
    precision: Precision, name: str, dtype: torch.dtype | None
) -> tuple[Run | None, frozenset[torch.dtype]]:
    """Give a conversion, or ``None`` where there is none, and the types that it leaves alone for certain.

    The contract's own is taken apart: its type is looked up once, and most tensors are seen to need nothing.
    """
    bound: Run = getattr(precision, name)
    if getattr(bound, "__func__", None) is not getattr(Precision, name):
        return bound, frozenset()
    if dtype is None:
        return None, frozenset()
    return converter(dtype), _EXACT | {dtype}


_EXACT: Final = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
"""Types of numbers that no precision rounds."""


def _as_it_is(data: Any) -> Any:
    return data


def _within(make: Callable[[], Any], run: Run) -> Run:
    def in_context(*args: Any, **kwargs: Any) -> Any:
        with make():
            return run(*args, **kwargs)

    return in_context


def _converted(
    make: Callable[[], Any],
    run: Run,
    convert_input: Run,
    kept_in: frozenset[torch.dtype],
    convert_output: Run,
    kept_out: frozenset[torch.dtype],
) -> Run:
    plain = torch.Tensor

    def converted(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args, kwargs = convert_input((args, kwargs))
        else:
            for one in args:
                # Looked at here, because a walk takes a microsecond to find that there is nothing to do.
                if one.__class__ is not plain or one.dtype not in kept_in:
                    args, kwargs = convert_input((args, kwargs))
                    break
        with make():
            result = run(*args, **kwargs)
        return result if result.__class__ is plain and result.dtype in kept_out else convert_output(result)

    return converted


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
            run = _renamed(_guarded(method, self._fabric_members), method)
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


def _guarded(method: MethodType, members: WeakSet[nn.Module]) -> Run:
    """Let a method run as long as it reaches no submodule: one that does must be marked."""
    kind, name = type(method.__self__).__name__, method.__name__

    def refuse(module: nn.Module) -> None:
        raise MisuseError(
            f"{kind}.{name} calls a part of the model directly, so the strategy would not synchronize its gradients",
            where=f"{kind}.{name}, at {type(module).__name__}",
            instead=f"mark it once after setup: model.mark_forward_method({name!r})",
            method=name,
        )

    def guarded(*args: Any, **kwargs: Any) -> Any:
        with _watched(members, refuse):
            result = method(*args, **kwargs)
        return _resumed(result, members, refuse) if inspect.isgenerator(result) else result

    return guarded


@contextmanager
def _watched(members: WeakSet[nn.Module], refuse: Callable[[nn.Module], None]) -> Iterator[None]:
    """Refuse that this thread calls one of the members inside the context, unless the strategy does."""
    thread = threading.get_ident()

    def refuse_direct_call(module: nn.Module, _inputs: Any) -> None:
        if threading.get_ident() == thread and module in members and not _in_route():
            refuse(module)

    # One hook for all modules of all threads: its cost doesn't grow with the model, which is not touched.
    handle = register_module_forward_pre_hook(refuse_direct_call)
    try:
        yield
    finally:
        handle.remove()


def _in_route() -> bool:
    """Say whether the calls that led here pass through a route; asked only before an error."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code is Route.forward.__code__:
            return True
        frame = frame.f_back
    return False


def _resumed(
    inner: Generator[Any, Any, Any], members: WeakSet[nn.Module], refuse: Callable[[nn.Module], None]
) -> Generator[Any, Any, Any]:
    """Watch a generator while it runs, and not while it waits."""
    step: Callable[[Any], Any] = inner.send
    value: Any = None
    while True:
        try:
            with _watched(members, refuse):
                item = step(value)
        except StopIteration as stop:
            return stop.value
        try:
            step, value = inner.send, (yield item)
        except GeneratorExit:
            inner.close()
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the generator's to handle
            step, value = inner.throw, error


def strategy_module(module: FabricModule) -> nn.Module:
    """Give what the strategy made of a model."""
    return module._fabric_inner  # noqa: SLF001 - the wrapper's own file
