"""A chosen plugin and the extensions that wrap it become bound behaviours.

[Note: bind once] Each behaviour is bound when a ``Fabric`` is built. Where nothing wraps it, the binding holds the
owner's own bound method, and a call costs what a method call costs. Only a wrapped behaviour goes through pluggy.
"""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, Final, TypeVar, cast

import pluggy

from fabric_core.contracts import CONTRACTS, LifeCycle, Plugin
from fabric_core.contracts._spec import behaviours, signature_fault
from fabric_core.errors import QuarantinedError, RequestError
from fabric_core.markers import PROJECT

__all__ = ["Trace", "around", "bind", "check_extension", "life_cycle", "owner_of"]

_MARK: Final = "fabric_around"

Trace = Callable[[str, float, BaseException | None], None]
"""Takes what was called (``kind.behaviour``), how many seconds it took, and what it raised."""


class _Around:
    """Marks methods of an extension that wrap a behaviour: ``@around.strategy``, ``@around.precision``, ..."""

    def __getattr__(self, kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        if kind not in CONTRACTS:
            raise AttributeError(f"there is no kind {kind!r} to wrap; there are: {', '.join(CONTRACTS)}")

        def mark(function: Callable[..., Any]) -> Callable[..., Any]:
            setattr(function, _MARK, kind)
            return function

        return mark


around: Final = _Around()
"""Marks a method of an extension that wraps the behaviour of its name: code before, ``result = yield``, code after."""


class _Manager(pluggy.PluginManager):
    """A plugin manager for one contract: an instance of it owns every behaviour that it specifies."""

    def __init__(self, contract: type[Plugin]) -> None:
        super().__init__(PROJECT)
        self._contract = contract
        self.add_hookspecs(contract)

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        if isinstance(plugin, self._contract):
            return _options(wrapper=False) if name in self.hook.__dict__ else None
        return _options(wrapper=True) if _wraps(plugin, name) == self._contract.kind else None


def _options(*, wrapper: bool) -> pluggy.HookimplOpts:
    return {
        "wrapper": wrapper,
        "hookwrapper": False,
        "optionalhook": False,
        "tryfirst": False,
        "trylast": False,
        "specname": None,
    }


def _wraps(extension: object, name: str) -> str | None:
    """Say of which kind a method of an extension wraps a behaviour, if it does."""
    kind: str | None = getattr(inspect.getattr_static(extension, name, None), _MARK, None)
    return kind


P = TypeVar("P", bound=Plugin)


def check_extension(extension: object) -> None:
    """Check that every marked method of an extension wraps a behaviour, or listens to a hook, that there is.

    Raises:
        RequestError: It has no marked method, or is a class.
        QuarantinedError: A method's name or arguments are not those of the behaviour or the hook.
    """
    if isinstance(extension, type):
        raise RequestError(
            "plugins was given a class", where="plugins", got=extension.__name__, instead=f"{extension.__name__}()"
        )
    marked = False
    for name in dir(extension):
        kind = _wraps(extension, name)
        if kind is not None:
            marked = True
            _check_wrapper(extension, name, kind)
    heard = [name for name in dir(extension) if getattr(getattr(type(extension), name, None), f"{PROJECT}_impl", None)]
    life_cycle([extension])
    if not marked and not heard:
        raise RequestError(
            "plugins was given an object that is no plugin, and has no method marked as an extension's",
            where="plugins",
            got=repr(extension),
            instead="methods marked with @around.<kind> or @hookimpl",
        )


def _check_wrapper(extension: object, name: str, kind: str) -> None:
    method = getattr(type(extension), name)
    known = behaviours(CONTRACTS[kind])
    where = f"{type(extension).__module__}.{type(extension).__qualname__}.{name}"
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise QuarantinedError(
            f"{type(extension).__name__}.{name} wraps a behaviour that a {kind} doesn't have",
            where=where,
            instead=f"did you mean {_shown(near[0], known)}?"
            if near
            else f"the behaviours of a {kind} are: {', '.join(known)}",
        )
    own = list(inspect.signature(method).parameters.values())[1:]
    strange = [
        one.name for one in own if one.name not in known[name] or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    valued = [one.name for one in own if one.default is not one.empty]
    if strange or valued:
        raise QuarantinedError(
            f"{type(extension).__name__}.{name} takes arguments that the behaviour doesn't have: {', '.join(strange)}"
            if strange
            else f"{type(extension).__name__}.{name} has default values, which would hide what is given",
            where=where,
            got=f"{name}{inspect.signature(method)}",
            instead=f"some of {_shown(name, known)}, without default values",
        )
    if not inspect.isgeneratorfunction(method):
        raise QuarantinedError(
            f"{type(extension).__name__}.{name} doesn't yield, so it can't go round the behaviour",
            where=where,
            instead="code before, `result = yield`, code after, `return result`",
        )


def _shown(name: str, known: Mapping[str, tuple[str, ...]]) -> str:
    return f"{name}({', '.join(('self', *known[name]))})"


def bind(owner: P, extensions: Sequence[object], trace: Trace | None = None) -> P:
    """Bind the behaviours of a plugin ([Note: bind once]).

    Args:
        owner: The chosen plugin.
        extensions: Checked objects whose marked methods wrap behaviours; the first is the outermost.
        trace: Told of each call.

    Returns:
        An object that has the contract's behaviours, each bound, and shows the owner's other attributes.

    Raises:
        QuarantinedError: The owner doesn't keep the signatures of its contract.
    """
    contract = CONTRACTS[owner.kind]
    fault = signature_fault(contract, type(owner))
    if fault is not None:
        got, expected = fault
        raise QuarantinedError(
            f"{type(owner).__name__} doesn't keep the signature of its contract",
            where=f"{type(owner).__module__}.{type(owner).__qualname__}",
            got=got,
            instead=expected,
        )
    names = behaviours(contract)
    bound: dict[str, Callable[..., Any]] = {name: getattr(owner, name) for name in names}
    wrapped = {name for one in extensions for name in names if _wraps(one, name) == owner.kind}
    if wrapped:
        manager = _Manager(contract)
        for plugin in (owner, *reversed(extensions)):
            manager.register(plugin)
        manager.check_pending()
        bound.update({name: _through(getattr(manager.hook, name), bound[name], names[name]) for name in wrapped})
    if trace is not None:
        label = f"{owner.kind} {type(owner).__name__}"
        bound = {name: _traced(function, f"{label}.{name}", trace) for name, function in bound.items()}
    return cast("P", _Bound(owner, extensions, bound))


class _Bound:
    """The bound behaviours of a plugin, as attributes."""

    def __init__(self, owner: Plugin, extensions: Sequence[object], bound: Mapping[str, Callable[..., Any]]) -> None:
        self.__dict__.update(bound)
        self._owner = owner
        self._extensions = extensions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_owner"], name)

    def __repr__(self) -> str:
        return repr(self._owner)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the plugin does, and be bound again."""
        return bind, (self._owner, tuple(self._extensions))


def owner_of(bound: P) -> P:
    """Give the plugin whose behaviours were bound."""
    return cast("P", bound.__dict__["_owner"])


def _through(caller: pluggy.HookCaller, method: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return caller(**dict(zip(names, args, strict=False)), **kwargs)

    return wrapped


def _traced(function: Callable[..., Any], label: str, trace: Trace) -> Callable[..., Any]:
    @wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            trace(label, time.perf_counter() - start, error)
            raise
        trace(label, time.perf_counter() - start, None)
        return result

    return traced


def life_cycle(listeners: Sequence[object]) -> LifeCycle:
    """Gather the listeners to life-cycle hooks.

    Raises:
        QuarantinedError: A listener has a hook that there isn't, or with arguments that it doesn't have.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(LifeCycle)
    try:
        for listener in listeners:
            manager.register(listener)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        hooks = [f"{name}({', '.join(('self', *names))})" for name, names in behaviours(LifeCycle).items()]
        raise QuarantinedError(
            f"{type(error.plugin).__name__} listens to what there isn't: {error}",
            where=f"{type(error.plugin).__module__}.{type(error.plugin).__qualname__}",
            instead=f"the life-cycle hooks are: {', '.join(hooks)}",
        ) from error
    return cast("LifeCycle", manager.hook)
