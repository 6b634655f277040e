"""The contract of a logger: takes metrics."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from fabric_core.contracts._spec import Plugin
from fabric_core.markers import behaviour

__all__ = ["Logger"]


class Logger(Plugin, ABC):
    """Takes metrics. The core calls it on rank 0 alone."""

    kind = "logger"

    @behaviour
    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Take metrics.

        Args:
            metrics: Numbers under their names.
            step: The step that they belong to; ``None`` lets the logger count.
        """

    @behaviour
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Take the settings of the run: nested dicts and lists of any values, those of other types by their text."""

    @behaviour
    def finalize(self, status: str) -> None:
        """Write out what is held and close; the status is ``"success"`` or ``"failed"``.

        May be called again, and without anything before it. What is logged after it is taken too, or refused by
        an error; it is never lost in silence.
        """
