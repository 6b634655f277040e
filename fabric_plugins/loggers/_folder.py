"""What loggers that write into a folder share: where the folder is, which version of the run it is, and one writer."""

import json
import math
import os
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import Field
from torch import nn

from fabric_core.collectives import Collectives
from fabric_core.contracts import Logger, PluginOptions

__all__ = ["AppendedFile", "FolderLogger", "FolderOptions", "RowLogger", "finite", "plain", "shown_as"]

_HYPERPARAMETERS: Final = "hparams.json"


class FolderOptions(PluginOptions):
    """The options of loggers that write into a folder."""

    root_dir: str = "."
    """The folder of all runs."""
    name: str = "lightning_logs"
    """The folder of this experiment, in ``root_dir``; empty for none."""
    version: int | str | None = None
    """The folder of this run, as it is or as the number in ``version_0``; ``None`` is the next number."""
    prefix: str = ""
    """Goes before every metric's name, with a dash."""


def shown_as(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a behaviour be called with more arguments, and with defaults, than its contract says.

    pluggy passes no argument that has a default value, so the signature that it sees is the contract's.

    Args:
        names: The arguments of the contract.
    """

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return method(self, *args, **kwargs)

        kind = Parameter.POSITIONAL_OR_KEYWORD
        call.__signature__ = Signature([Parameter(name, kind) for name in ("self", *names)])  # type: ignore[attr-defined]
        return call

    return mark


class FolderLogger(Logger):
    """Writes into ``root_dir/name/version_N``, on rank 0; the folder is made when something is written.

    Which version a run is depends on the folders that are there when it is first asked for; with several ranks, what
    rank 0 finds at ``launch`` holds for all.

    Args:
        root_dir: The folder of all runs; or all options.
        name: The folder of this experiment, in ``root_dir``; empty for none.
        version: The folder of this run; ``None`` is the next ``version_N``. One that is there is continued.
        prefix: Goes before every metric's name, with a dash.
        more: The options that a logger has beyond these.
    """

    LOGGER_JOIN_CHAR = "-"
    Options = FolderOptions
    options: FolderOptions

    def __init__(
        self,
        root_dir: PluginOptions | str | Path = ".",
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        **more: Any,
    ) -> None:
        if isinstance(root_dir, PluginOptions):
            super().__init__(root_dir)
        else:
            super().__init__(root_dir=str(root_dir), name=name or "", version=version, prefix=prefix, **more)
        self._version = self.options.version
        self._writes = True
        self._count = 0

    def connect(self, collectives: Collectives) -> None:
        """Let rank 0 write, into a folder that all ranks know."""
        self._writes = collectives.rank == 0
        if collectives.world_size > 1:
            self._version = collectives.broadcast(self.version if self._writes else None, 0)

    @property
    def root_dir(self) -> str:
        """The folder of all runs."""
        return self.options.root_dir

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self.options.name

    @property
    def version(self) -> int | str:
        """The number or name of this run."""
        if self._version is None:
            self._version = _next_version(Path(self.root_dir, self.name))
        return self._version

    @property
    def log_dir(self) -> str:
        """The folder that this run writes into."""
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return str(Path(self.root_dir, self.name, version))

    @property
    def group_separator(self) -> str:
        """What groups names of metrics."""
        return "/"

    @property
    def experiment(self) -> Any:
        """What writes; on other ranks than the first, an object that takes every call and does nothing."""
        return self._writer() if self._writes else Silent()

    @abstractmethod
    def _writer(self) -> Any:
        """Give what writes, made when it is first asked for."""

    @shown_as("metrics", "step")
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write metrics.

        Args:
            metrics: Numbers under their names.
            step: The step that they belong to; ``None`` counts the calls.
        """
        if not self._writes or not metrics:
            return
        prefix = f"{self.options.prefix}{self.LOGGER_JOIN_CHAR}" if self.options.prefix else ""
        values = {f"{prefix}{name}": plain(value) for name, value in metrics.items()}
        self._write(values, self._count if step is None else step)
        self._count += 1

    @abstractmethod
    def _write(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write a row of numbers."""

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Write the settings of the run into ``hparams.json``; later ones are added to earlier ones."""
        if not self._writes:
            return
        path = Path(self.log_dir, _HYPERPARAMETERS)
        path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known.update(settings(params))
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(finite(known), indent=2, default=str) + "\n", encoding="utf-8")
        written.replace(path)

    def log_graph(self, model: nn.Module, input_array: torch.Tensor | None = None) -> None:
        """Take the graph of a model; nothing is written of it here."""

    def save(self) -> None:
        """Flush what was written to the disk."""


class RowOptions(FolderOptions):
    """The options of loggers that write a row a call."""

    flush_logs_every_n_steps: int = Field(default=100, ge=1)
    """After how many rows they are brought to the disk. Each row is handed to the system at once all the same."""


class RowLogger(FolderLogger):
    """Writes a row a call into a file of its folder.

    Args:
        root_dir: The folder of all runs.
        name: The folder of this experiment, in ``root_dir``; empty for none.
        version: The folder of this run; ``None`` is the next ``version_N``. One that is there is continued.
        prefix: Goes before every metric's name, with a dash.
        flush_logs_every_n_steps: After how many rows they are brought to the disk.
    """

    Options = RowOptions
    options: RowOptions

    def __init__(
        self,
        root_dir: PluginOptions | str | Path = ".",
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(root_dir, name, version, prefix, flush_logs_every_n_steps=flush_logs_every_n_steps)
        self._rows: Any = None

    @abstractmethod
    def _open(self, folder: Path, sync_every: int) -> Any:
        """Open the file; gives an object with the methods ``save`` and ``close``."""

    def _writer(self) -> Any:
        if self._rows is None:
            self._rows = self._open(Path(self.log_dir), self.options.flush_logs_every_n_steps)
        return self._rows

    def save(self) -> None:
        """Write every row to the disk."""
        if self._rows is not None:
            self._rows.save()

    def finalize(self, status: str) -> None:
        """Write every row to the disk, and close the file."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None


class Silent:
    """Takes every call and does nothing."""

    def __getattr__(self, name: str) -> "Silent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_args: Any, **_kwargs: Any) -> "Silent":
        """Do nothing."""
        return self

    def __getitem__(self, _index: Any) -> "Silent":
        return self

    def __setitem__(self, _index: Any, _value: Any) -> None:
        pass


def _next_version(folder: Path) -> int:
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return 0
    numbers = [int(name.removeprefix("version_")) for name in names if name.removeprefix("version_").isdecimal()]
    return max(numbers, default=-1) + 1


def settings(params: Any) -> dict[str, Any]:
    """Give settings as a dict: they may be the namespace of an argument parser."""
    return dict(vars(params)) if isinstance(params, Namespace) else dict(params)


def plain(value: Any) -> Any:
    """Give the number in a tensor or array of one element, and anything else as it is.

    Raises:
        ValueError: It has several elements.
    """
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def finite(value: Any) -> Any:
    """Give what JSON can say: numbers that are not finite as text that ``float`` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


class AppendedFile:
    """A file that lines are appended to: each in one call of the system, so that a killed process leaves whole lines.

    Args:
        path: The file; where it is there already it is continued.
        sync_every: After how many lines the system is told to write them to the disk.
    """

    def __init__(self, path: Path, sync_every: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._sync_every = sync_every
        self._unsynced = 0
        self._file = path.open("ab+", buffering=0)
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")  # the end of a line that a machine which lost power left unfinished

    def append(self, line: str) -> None:
        """Append a line."""
        self._file.write(line.encode() + b"\n")
        self._unsynced += 1
        if self._unsynced >= self._sync_every:
            self.save()

    def save(self) -> None:
        """Write every line to the disk."""
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def close(self) -> None:
        """Close the file."""
        self.save()
        self._file.close()
