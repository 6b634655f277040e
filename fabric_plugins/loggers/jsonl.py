"""Metrics in a file of JSON objects, one a line."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import Field

from fabric_core.contracts import PluginOptions
from fabric_plugins.loggers._folder import AppendedFile, FolderLogger, FolderOptions, finite

__all__ = ["JSONLLogger", "JSONLOptions"]

_FILE: Final = "metrics.jsonl"


class JSONLOptions(FolderOptions):
    """The options of the logger ``jsonl``."""

    flush_logs_every_n_steps: int = Field(default=100, ge=1)
    """After how many rows they are brought to the disk. Each row is handed to the system at once all the same."""


class JSONLLogger(FolderLogger):
    """Writes metrics into ``metrics.jsonl``, an object a call, and settings into ``hparams.json``.

    Each object has ``step`` and ``time``, which is in seconds since 1970. A number that is not finite is written as
    text that ``float`` reads.

    Args:
        root_dir: The folder of all runs.
        name: The folder of this experiment, in ``root_dir``; empty for none.
        version: The folder of this run; ``None`` is the next ``version_N``. One that is there is continued.
        prefix: Goes before every metric's name, with a dash.
        flush_logs_every_n_steps: After how many rows they are brought to the disk.
    """

    Options = JSONLOptions
    options: JSONLOptions

    def __init__(
        self,
        root_dir: PluginOptions | str | Path = ".",
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        if isinstance(root_dir, PluginOptions):
            super().__init__(root_dir)
        else:
            super().__init__(
                root_dir=str(root_dir),
                name=name or "",
                version=version,
                prefix=prefix,
                flush_logs_every_n_steps=flush_logs_every_n_steps,
            )
        self._file: AppendedFile | None = None

    def _writer(self) -> AppendedFile:
        if self._file is None:
            self._file = AppendedFile(Path(self.log_dir, _FILE), self.options.flush_logs_every_n_steps)
        return self._file

    def _write(self, metrics: Mapping[str, Any], step: int) -> None:
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        self._writer().append(json.dumps(finite(row), default=str))

    def save(self) -> None:
        """Write every row to the disk."""
        if self._file is not None:
            self._file.sync()

    def finalize(self, status: str) -> None:
        """Write every row to the disk, and close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
