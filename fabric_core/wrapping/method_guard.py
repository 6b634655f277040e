"""An unmarked method may not reach a submodule: the strategy would not synchronize its gradients."""

import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import FrameType, MethodType
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fabric_core.errors import MisuseError
from fabric_core.wrapping.forward import Route, Run

__all__ = ["guarded"]


def guarded(method: MethodType, members: WeakSet[nn.Module]) -> Run:
    """Let a method run as long as it reaches no submodule: one that does must be marked."""
    kind, name = type(method.__self__).__name__, method.__name__

    def refuse(module: nn.Module) -> None:
        raise MisuseError(
            f"{kind}.{name} calls a part of the model directly, so the strategy would not synchronize its gradients",
            where=f"{kind}.{name}, at {type(module).__name__}",
            instead=f"mark it once after setup: model.mark_forward_method({name!r})",
            method=name,
        )

    def run(*args: Any, **kwargs: Any) -> Any:
        with _watched(members, refuse):
            result = method(*args, **kwargs)
        return _resumed(result, members, refuse) if inspect.isgenerator(result) else result

    return run


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
