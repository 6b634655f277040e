"""Metrics in a file of comma-separated values.

[Note: parts] A row with a name that is new can't go into a file whose header lacks it, and what was written is left as
it is. So such a row begins another part, ``metrics_1.csv`` and so on, whose header has every name so far. ``save`` and
``finalize`` join the parts into ``metrics.csv``, written aside and then renamed. After a crash the parts are there.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fabric_plugins.loggers._folder import AppendedFile, RowLogger

__all__ = ["CSVLogger"]

_STEP: Final = "step"


class CSVLogger(RowLogger):
    """Writes metrics into ``metrics.csv``, a row a call, and settings into ``hparams.json``.

    Args:
        root_dir: The folder of all runs.
        name: The folder of this experiment, in ``root_dir``; empty for none.
        version: The folder of this run; ``None`` is the next ``version_N``. One that is there is continued.
        prefix: Goes before every metric's name, with a dash.
        flush_logs_every_n_steps: After how many rows they are brought to the disk.
    """

    def _open(self, folder: Path, sync_every: int) -> "Rows":
        return Rows(folder, sync_every)

    def _write(self, metrics: Mapping[str, Any], step: int) -> None:
        self._writer().log_metrics(metrics, step)


class Rows:
    """The rows of one run ([Note: parts]).

    Args:
        log_dir: The folder.
        sync_every: After how many rows they are brought to the disk.
    """

    NAME_METRICS_FILE = "metrics.csv"

    def __init__(self, log_dir: Path, sync_every: int) -> None:
        self.log_dir = str(log_dir)
        self.metrics_file_path = str(log_dir / self.NAME_METRICS_FILE)
        self.metrics_keys: list[str] = []
        self._sync_every = sync_every
        self._parts = _parts(Path(self.metrics_file_path))
        self._file: AppendedFile | None = None
        if self._parts:
            with self._parts[-1].open(encoding="utf-8", newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])
            self._join()

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int) -> None:
        """Write a row."""
        row = {_STEP: step, **{name: value for name, value in metrics_dict.items() if name != _STEP}}
        new = [name for name in row if name not in self.metrics_keys]
        if new:
            self.metrics_keys += new
            self._begin_part()
        if self._file is None:
            self._file = AppendedFile(self._parts[-1], self._sync_every)
        self._file.append(_line([row.get(name, "") for name in self.metrics_keys]))

    def _begin_part(self) -> None:
        if self._file is not None:
            self._file.close()
        first = Path(self.metrics_file_path)
        self._parts.append(first.with_stem(f"{first.stem}_{len(self._parts)}") if self._parts else first)
        self._file = AppendedFile(self._parts[-1], self._sync_every)
        self._file.append(_line(self.metrics_keys))

    def save(self) -> None:
        """Write every row to the disk, in one file."""
        if self._file is not None:
            self._file.save()
        self._join()

    def close(self) -> None:
        """Write every row to the disk, in one file, and close it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._join()

    def _join(self) -> None:
        """Make one part of several."""
        if len(self._parts) == 1:
            return
        first = self._parts[0]
        with (joined := first.with_suffix(".tmp")).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.metrics_keys)
            for part in self._parts:
                with part.open(encoding="utf-8", newline="") as rows:
                    reader = csv.reader(rows)
                    next(reader, None)
                    writer.writerows(row + [""] * (len(self.metrics_keys) - len(row)) for row in reader)
        if self._file is not None:
            self._file.close()
            self._file = None
        joined.replace(first)
        for part in self._parts[1:]:
            part.unlink()
        self._parts = [first]


def _parts(first: Path) -> list[Path]:
    """Find the parts that an earlier process left, in order."""
    numbered = [path for path in first.parent.glob(f"{first.stem}_*{first.suffix}") if _number(path).isdecimal()]
    return [path for path in [first, *sorted(numbered, key=lambda path: int(_number(path)))] if path.exists()]


def _number(part: Path) -> str:
    return part.stem.rpartition("_")[2]


def _line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()
