"""Extensions go round the behaviours of a plugin, on the plugin itself.

[Note: bind once] Each behaviour is bound when a ``Fabric`` is built, and a bound plugin is the plugin: for each wrapped
behaviour an attribute of the instance hides the method and leads through pluggy to the extensions and then to that
method. So everybody who calls the behaviour meets the extensions, the plugin itself included, and a behaviour that
nothing wraps costs what a method call costs. What is wrapped, and the one plugin of a kind that has one, belongs to one
living ``Fabric``.
"""

import gc
import inspect
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from typing import Any, Final, cast

import pluggy

from fabric_core.collectives import Collectives
from fabric_core.contracts import FabricActs, LifeCycle
from fabric_core.contracts._spec import BOUND, Bound, behaviours, bound_of, signature_fault
from fabric_core.errors import MisuseError, QuarantinedError, RequestError
from fabric_core.kinds import KINDS, Count
from fabric_core.markers import PROJECT

__all__ = ["Bindings", "Trace", "around", "check_extension", "life_cycle"]

_MARK: Final = "fabric_around"

_EVERY: Final = "every"
"""In the place of a kind: all behaviours of all kinds."""

_BESIDE: Final[Mapping[str, type[Any]]] = {Collectives.kind: Collectives, FabricActs.kind: FabricActs}
"""What may be wrapped beside plugins: collectives, which a strategy makes, and the façade's own acts."""


def _contract(kind: str) -> type[Any] | None:
    """Give what specifies the behaviours of a kind, or of what may be wrapped beside plugins."""
    return KINDS[kind].contract if kind in KINDS else _BESIDE.get(kind)


Trace = Callable[[str, float, BaseException | None], None]
"""Takes what was called (``kind.behaviour``), how many seconds it took, and what it raised."""


class _Around:
    """Marks methods of an extension that wrap a behaviour: ``@around.strategy``, ``@around.precision``, ...

    A method that is marked by ``@around.every`` wraps all behaviours of all kinds. It takes the behaviour's name, such
    as ``"strategy.backward"``, and is called for each call of each.
    """

    def __getattr__(self, kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        if kind != _EVERY and _contract(kind) is None:
            known = ", ".join([*KINDS, *_BESIDE, _EVERY])
            raise AttributeError(f"there is no kind {kind!r} to wrap; there are: {known}")

        def mark(function: Callable[..., Any]) -> Callable[..., Any]:
            setattr(function, _MARK, kind)
            return function

        return mark


around: Final = _Around()
"""Marks a method of an extension that wraps the behaviour of its name: code before, ``result = yield``, code after."""


class _Manager(pluggy.PluginManager):
    """A plugin manager for one contract: an instance of it owns every behaviour that it specifies."""

    def __init__(self, contract: type[Any]) -> None:
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


def check_extension(extension: object) -> None:
    """Check that every marked method of an extension wraps a known behaviour, or implements a known hook.

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
    known = {name: ("behaviour",)} if kind == _EVERY else behaviours(cast("Any", _contract(kind)))
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


class Bindings:
    """What one ``Fabric`` has bound ([Note: bind once]).

    Args:
        extensions: Checked objects whose marked methods wrap behaviours; the first is the outermost.
        trace: Told of each call.
    """

    def __init__(self, extensions: Sequence[object] = (), trace: Trace | None = None) -> None:
        self._extensions = extensions
        self._trace = trace
        self._every = [
            contextmanager(getattr(one, name)) for one in extensions for name in dir(one) if _wraps(one, name) == _EVERY
        ]
        self._owners: list[Any] = []
        self._released: list[Any] = []

    def bind(self, owner: Any) -> None:
        """Bind the behaviours of a plugin, on the plugin itself.

        Raises:
            QuarantinedError: It doesn't keep the signatures of its contract.
            MisuseError: It belongs to another living ``Fabric``.
        """
        _check_signatures(owner)
        contract, single = cast("Any", _contract(owner.kind)), _is_single(owner)
        names = behaviours(contract)
        wrapping = [one for one in self._extensions if any(_wraps(one, name) == owner.kind for name in names)]
        watched = bool(self._trace or self._every)
        if not (single or wrapping or watched) or not self._claim(owner, alone=bool(wrapping)):
            return
        bound: dict[str, Callable[..., Any]] = {}
        if wrapping:
            manager = _Manager(contract)
            for plugin in (owner, *reversed(wrapping)):
                manager.register(plugin)
            manager.check_pending()
            wrapped = [name for name in names if any(_wraps(one, name) == owner.kind for one in wrapping)]
            bound = {name: _through(getattr(manager.hook, name), getattr(owner, name), names[name]) for name in wrapped}
        for every in self._every:
            calls = {name: bound.get(name) or getattr(owner, name) for name in names}
            bound = {name: _within(call, f"{owner.kind}.{name}", every) for name, call in calls.items()}
        if self._trace is not None:
            label = f"{owner.kind} {type(owner).__name__}"
            calls = {name: bound.get(name) or getattr(owner, name) for name in names}
            bound = {name: _traced(call, f"{label}.{name}", self._trace) for name, call in calls.items()}
        attributes = vars(owner)
        hidden = {name: attributes[name] for name in bound if name in attributes}
        extensions = tuple(type(one).__name__ for one in wrapping)
        attributes.update(bound, **{BOUND: Bound(weakref.ref(self), tuple(bound), hidden, extensions)})
        self._owners.append(owner)

    def _claim(self, owner: Any, *, alone: bool) -> bool:
        """Make a plugin this ``Fabric``'s own; false where there is nothing left to do.

        Args:
            owner: The plugin.
            alone: It will be wrapped, so that nobody else may have it, whatever its kind.
        """
        earlier = bound_of(owner)
        holder = None if earlier is None else earlier.living()
        if holder is self:
            return False
        if earlier is not None and holder is not None:
            # A Fabric that nobody can reach any more may wait for the collector.
            del holder
            gc.collect()
            if earlier.living() is not None:
                if not (alone or earlier.extensions or _is_single(owner)):
                    return False  # shared, and traced once
                raise MisuseError(
                    f"this {owner.kind} belongs to another Fabric that is still in use",
                    where=f"Fabric({KINDS[owner.kind].argument or 'plugins'}=...)"
                    if owner.kind in KINDS
                    else "fabric.launch()",
                    got=f"an instance of {type(owner).__name__}",
                    instead="a new instance for each Fabric, or teardown() of the first one before",
                )
        if earlier is not None:
            _unbind(owner)
        return True

    def renew(self) -> None:
        """Bind again what was let go of; nothing where that is not so.

        Raises:
            MisuseError: Another living ``Fabric`` has taken one in the meantime.
        """
        while self._released:
            self.bind(self._released.pop())

    def undo(self) -> None:
        """Let go of every plugin, each as it was."""
        while self._owners:
            owner = self._owners.pop()
            if owner.kind != Collectives.kind:  # those are closed now
                self._released.append(owner)
            bound = bound_of(owner)
            if bound is not None and bound.living() is self:
                _unbind(owner)


def _is_single(owner: Any) -> bool:
    return owner.kind in KINDS and KINDS[owner.kind].count is Count.ONE


def _unbind(owner: Any) -> None:
    bound: Bound = vars(owner).pop(BOUND)
    for name in bound.names:
        vars(owner).pop(name, None)
    vars(owner).update(bound.hidden)


def _check_signatures(owner: Any) -> None:
    fault = signature_fault(cast("Any", _contract(owner.kind)), type(owner))
    if fault is not None:
        got, expected = fault
        raise QuarantinedError(
            f"{type(owner).__name__} doesn't keep the signature of its contract",
            where=f"{type(owner).__module__}.{type(owner).__qualname__}",
            got=got,
            instead=expected,
        )


def _through(caller: pluggy.HookCaller, method: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    expected = frozenset(names)

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False), **kwargs) if args else kwargs
        if given.keys() != expected or len(args) + len(kwargs) != len(expected):
            return method(*args, **kwargs)  # which raises the TypeError that a call with wrong arguments raises
        return caller(**given)

    return wrapped


def _within(function: Callable[..., Any], label: str, context: Callable[[str], Any]) -> Callable[..., Any]:
    @wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        with context(label):
            return function(*args, **kwargs)

    return within


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
            f"{type(error.plugin).__name__} implements an unknown life-cycle hook: {error}",
            where=f"{type(error.plugin).__module__}.{type(error.plugin).__qualname__}",
            instead=f"the life-cycle hooks are: {', '.join(hooks)}",
        ) from error
    return cast("LifeCycle", manager.hook)
