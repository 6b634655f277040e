"""A chosen plugin and the extensions that wrap it become bound behaviours.

[Note: bind once] Each behaviour is bound when a ``Fabric`` is built. Where nothing wraps it, the binding holds the
owner's own bound method, and a call costs what a method call costs. Only a wrapped behaviour goes through pluggy.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, cast

import pluggy

from fabric_core.contracts import CONTRACTS, LifeCycle, Plugin
from fabric_core.contracts._spec import PROJECT
from fabric_core.errors import QuarantinedError

__all__ = ["around", "bind", "life_cycle"]

_MARK: Final = "fabric_around"


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
        self._marked: set[str] = set()
        self.add_hookspecs(contract)

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        if isinstance(plugin, self._contract):
            return _options(wrapper=False) if name in self.hook.__dict__ else None
        method = inspect.getattr_static(plugin, name, None)
        kind = getattr(method, _MARK, None)
        return _options(wrapper=True) if kind == self._contract.kind else None


def _options(*, wrapper: bool) -> pluggy.HookimplOpts:
    return {
        "wrapper": wrapper,
        "hookwrapper": False,
        "optionalhook": False,
        "tryfirst": False,
        "trylast": False,
        "specname": None,
    }


P = TypeVar("P", bound=Plugin)


def bind(owner: P, extensions: Sequence[object]) -> P:
    """Bind the behaviours of a plugin ([Note: bind once]).

    Args:
        owner: The chosen plugin.
        extensions: Objects whose marked methods wrap behaviours; the first is the outermost.

    Returns:
        An object that has the contract's behaviours, each bound, and shows the owner's other attributes.

    Raises:
        QuarantinedError: A method wraps a behaviour that there isn't, or takes arguments that it doesn't have.
    """
    manager = _Manager(CONTRACTS[owner.kind])
    names = [name for name in vars(manager.hook) if not name.startswith("_")]
    try:
        for plugin in (owner, *reversed(extensions)):
            manager.register(plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise QuarantinedError(
            f"{type(error.plugin).__name__} doesn't fit the contract of a {owner.kind}: {error}",
            where=f"{type(error.plugin).__module__}.{type(error.plugin).__qualname__}",
            instead=f"the behaviours of a {owner.kind} are: {', '.join(names)}",
        ) from error
    return cast("P", _Bound(owner, {name: _bound(owner, manager, name) for name in names}))


class _Bound:
    """The bound behaviours of a plugin, as attributes."""

    def __init__(self, owner: Plugin, behaviours: dict[str, Callable[..., Any]]) -> None:
        self.__dict__.update(behaviours)
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_owner"], name)


def _bound(owner: Plugin, manager: _Manager, name: str) -> Callable[..., Any]:
    caller = getattr(manager.hook, name)
    method: Callable[..., Any] = getattr(owner, name)
    _check_signature(owner, method, caller.spec.argnames)
    if len(caller.get_hookimpls()) == 1:
        return method
    names = caller.spec.argnames

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return caller(**dict(zip(names, args, strict=False)), **kwargs)

    wrapped.__name__ = name
    wrapped.__doc__ = method.__doc__
    return wrapped


def _check_signature(owner: Plugin, method: Callable[..., Any], names: tuple[str, ...]) -> None:
    """Refuse what pluggy would accept: fewer arguments, or some with default values ([Note: no default values])."""
    own = list(inspect.signature(method).parameters.values())
    if [parameter.name for parameter in own] == list(names) and all(
        parameter.default is parameter.empty for parameter in own
    ):
        return
    raise QuarantinedError(
        f"{type(owner).__name__}.{method.__name__} doesn't have the signature of its contract",
        where=f"{type(owner).__module__}.{type(owner).__qualname__}",
        got=f"{method.__name__}{inspect.signature(method)}",
        instead=f"{method.__name__}({', '.join(('self', *names))}), without default values",
    )


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
        names = [name for name in vars(manager.hook) if not name.startswith("_")]
        raise QuarantinedError(
            f"{type(error.plugin).__name__} listens to what there isn't: {error}",
            where=f"{type(error.plugin).__module__}.{type(error.plugin).__qualname__}",
            instead=f"the life-cycle hooks are: {', '.join(names)}",
        ) from error
    return cast("LifeCycle", manager.hook)
