"""Extensions: what goes round the behaviours of whatever was chosen."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_plugins.extensions.profiler import Profiler

__all__ = ["Profiler"]

__getattr__, __dir__ = lazy(__name__, {"Profiler": "profiler"})
