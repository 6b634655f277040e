"""The contract of a logger: takes metrics."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from fabric_core.collectives import Collectives
from fabric_core.contracts._spec import Plugin
from fabric_core.markers import behaviour

__all__ = ["Logger"]


class Logger(Plugin, ABC):
    """Takes metrics. The core calls it on rank 0 alone, but for ``connect``.

    Any other object with a method ``log_metrics(metrics, step)`` may be given to ``Fabric(loggers=...)`` as well; its
    ``log_hyperparams`` and ``finalize``, or ``save``, are called where it has them.
    """

    kind = "logger"

    @behaviour
    def connect(self, collectives: Collectives) -> None:
        """Receive the collectives; called once on every rank, after the strategy has connected.

        Args:
            collectives: For what the ranks must agree on, such as a folder; before any metric is logged.
        """

    @behaviour
    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Take metrics.

        Args:
            metrics: Numbers under their names. What the user gave that is no number, tensor or array comes as it is.
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

    @classmethod
    def adapt(cls, instance: Any) -> "Logger | None":
        """Take any object with a method ``log_metrics``."""
        return AdaptedLogger(instance) if callable(getattr(instance, "log_metrics", None)) else None


class AdaptedLogger(Logger):
    """Stands for an object that takes metrics without being a ``Logger``.

    Args:
        original: The object.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original = original

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Pass them on."""
        self.original.log_metrics(metrics, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Pass them on, where they are wanted."""
        take = getattr(self.original, "log_hyperparams", None)
        if callable(take):
            take(params)

    def finalize(self, status: str) -> None:
        """Let it save and close, where it can."""
        save, close = getattr(self.original, "save", None), getattr(self.original, "finalize", None)
        if callable(close):
            close(status)
        elif callable(save):
            save()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the object does."""
        return type(self), (self.original,)

    def __repr__(self) -> str:
        """Show the object."""
        return repr(self.original)
