"""A plugin shows itself as the call that makes it, alike in every process."""

from collections.abc import Callable
from typing import Any

from fabric_core.contracts import Logger, PluginOptions


class NotedOptions(PluginOptions):
    """A function, a set, and a number that is left as it is."""

    function: Callable[..., Any] | None = None
    names: frozenset[str] = frozenset()
    level: int = 1


class Noted(Logger):
    """Shows its options."""

    Options = NotedOptions

    def log_metrics(self, metrics: Any, step: int | None) -> None:
        """Forget it."""


def test_functions_are_named_and_sets_are_in_order() -> None:
    """No address and no order of a hash, which differ between processes."""
    shown = repr(Noted(function=len, names={"e", "d", "c", "b", "a"}))
    assert shown == "Noted(function='builtins.len', names=['a', 'b', 'c', 'd', 'e'])"
