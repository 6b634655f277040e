"""Metrics in a file of JSON objects, one a line."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fabric_plugins.loggers._folder import AppendedFile, RowLogger, finite

__all__ = ["JSONLLogger"]

_FILE: Final = "metrics.jsonl"


class JSONLLogger(RowLogger):
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

    def _open(self, folder: Path, sync_every: int) -> AppendedFile:
        return AppendedFile(folder / _FILE, sync_every)

    def _write(self, metrics: Mapping[str, Any], step: int) -> None:
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        self._writer().append(json.dumps(finite(row), default=str))
