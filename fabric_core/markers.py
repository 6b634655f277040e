"""The markers that make a method a pluggy hook specification, or a listener to one.

[Note: no default values] pluggy matches arguments by name and leaves out those that have a default value. So a
behaviour has none: the façade fills in what its caller left out, and every owner and extension sees every argument.
"""

from typing import Final

import pluggy

__all__ = ["PROJECT", "behaviour", "event", "hookimpl"]

PROJECT: Final = "fabric"
"""The name under which pluggy knows the project."""

_specification = pluggy.HookspecMarker(PROJECT)

behaviour = _specification(firstresult=True)
"""Marks a method of a contract: it has one owner, whose result is the result."""

event = _specification
"""Marks a life-cycle hook: it has any number of listeners."""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a method of an extension that implements a life-cycle hook."""
