"""Changes of the project's code that no test can notice, each with the reason."""

from collections.abc import Mapping
from typing import Final

__all__ = ["EQUIVALENT"]

_REASONS: Final[Mapping[str, tuple[str, ...]]] = {
    "an empty list is refused by an earlier fault of the same table": (
        "fabric_core.contracts.accelerator.parse_device_indices: 0 -> 1 #4",
    ),
    "it is what zip does when it is told nothing; the linter wants it said": (
        "fabric_core.binding._through.wrapped: zip(names, args, strict=False) -> zip(names, args)",
    ),
    "it is computed once for an object already, and kept": (
        (
            "fabric_core.cli._meeting.Job.registry: return find_registry() -> return "
            "self.__dict__.setdefault('_stale_registry', find_registry())"
        ),
    ),
    "what is kept more is an earlier moment of the same size, which decides no maximum": (
        "fabric_core.cli._memory._Live._note: self.moments[-1][0] <= self.live -> self.moments[-1][0] < self.live",
    ),
}

EQUIVALENT: Final[Mapping[str, str]] = {key: reason for reason, keys in _REASONS.items() for key in keys}
"""Each change's key, with the reason."""
