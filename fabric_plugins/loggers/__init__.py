"""Loggers: where metrics go."""

from typing import TYPE_CHECKING

from fabric_core.contracts import Logger
from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_plugins.loggers.csv import CSVLogger
    from fabric_plugins.loggers.jsonl import JSONLLogger
    from fabric_plugins.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "JSONLLogger", "Logger", "TensorBoardLogger"]

__getattr__, __dir__ = lazy(
    __name__,
    {"CSVLogger": "csv", "JSONLLogger": "jsonl", "TensorBoardLogger": "tensorboard"},
)
