"""Metrics for TensorBoard, through ``torch.utils.tensorboard``."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from fabric_core.contracts import PluginOptions, map_tensors
from fabric_core.errors import NotInstalledError
from fabric_plugins.loggers._folder import FolderLogger, FolderOptions, plain, settings, shown_as

__all__ = ["TensorBoardLogger", "TensorBoardOptions"]


class TensorBoardOptions(FolderOptions):
    """The options of the logger ``tensorboard``."""

    default_hp_metric: bool = True
    """Write ``hp_metric`` with settings that are given without metrics, so that TensorBoard shows them."""
    sub_dir: str | None = None
    """A folder in the run's folder that the events go into."""
    writer: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of ``torch.utils.tensorboard.SummaryWriter``."""


class TensorBoardLogger(FolderLogger):
    """Writes events that TensorBoard shows. Each call's events are in the file when it returns.

    Args:
        root_dir: The folder of all runs.
        name: The folder of this experiment, in ``root_dir``; empty for none.
        version: The folder of this run; ``None`` is the next ``version_N``. One that is there is continued.
        default_hp_metric: Write ``hp_metric`` with settings that are given without metrics.
        prefix: Goes before every metric's name, with a dash.
        sub_dir: A folder in the run's folder that the events go into.
        kwargs: Further arguments of ``torch.utils.tensorboard.SummaryWriter``.

    Raises:
        NotInstalledError: The package ``tensorboard`` isn't installed.
    """

    Options = TensorBoardOptions
    options: TensorBoardOptions

    def __init__(
        self,
        root_dir: PluginOptions | str | Path = ".",
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root_dir,
            name,
            version,
            prefix,
            default_hp_metric=default_hp_metric,
            sub_dir=None if sub_dir is None else str(sub_dir),
            writer=kwargs,
        )
        _summary_writer()
        self._events: Any = None

    @property
    def sub_dir(self) -> str | None:
        """The folder in the run's folder that the events go into."""
        return self.options.sub_dir

    @property
    def log_dir(self) -> str:
        """The folder that the events go into."""
        return str(Path(super().log_dir, self.sub_dir or ""))

    def _writer(self) -> Any:
        if self._events is None:
            self._events = _summary_writer()(log_dir=self.log_dir, **self.options.writer)
        return self._events

    def _write(self, metrics: Mapping[str, Any], step: int) -> None:
        writer = self._writer()
        for name, value in metrics.items():
            if isinstance(value, Mapping):
                writer.add_scalars(name, {one: plain(part) for one, part in value.items()}, step)
            else:
                writer.add_scalar(name, value, step)
        writer.flush()

    @shown_as("params")
    def log_hyperparams(self, params: Mapping[str, Any], metrics: Any = None, step: int | None = None) -> None:
        """Write the settings of the run.

        Args:
            params: The settings; nested ones are named by their path, ``outer/inner``.
            metrics: What the settings led to, which TensorBoard shows beside them: numbers under their names, or one.
            step: The step that the metrics belong to.
        """
        if not self._writes:
            return
        super().log_hyperparams(params)
        if metrics is None:
            metrics = {"hp_metric": -1} if self.options.default_hp_metric else {}
        elif not isinstance(metrics, Mapping):
            metrics = {"hp_metric": metrics}
        if metrics:
            values = {name: plain(value) for name, value in metrics.items()}
            # Without a name of its own, each call would become a run of its own, in a folder of its own.
            self._writer().add_hparams(_flat(settings(params)), values, run_name=".", global_step=step)

    @shown_as("model", "input_array")
    def log_graph(self, model: nn.Module, input_array: torch.Tensor | None = None) -> None:
        """Write the graph of a model.

        Args:
            model: The model; as it was set up, or the bare one.
            input_array: What to trace it with; not given, its ``example_input_array``.

        Raises:
            ValueError: There is no input to trace it with.
        """
        if not self._writes:
            return
        given = getattr(model, "example_input_array", None) if input_array is None else input_array
        if given is None:
            raise ValueError(
                f"no input to trace {type(model).__name__} with: log_graph(model, input_array=...), or"
                " model.example_input_array"
            )
        bare = getattr(model, "module", model)
        place = next((one.device for one in bare.parameters()), torch.device("cpu"))
        given = map_tensors(given, lambda one: one.to(place))
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):  # of its only way, before PyTorch 2.14 and since
                warnings.filterwarnings("ignore", message=".*torch.jit.trace", category=category)
            self._writer().add_graph(bare, given)
        self._writer().flush()

    def save(self) -> None:
        """Write every event to the file."""
        if self._events is not None:
            self._events.flush()

    def finalize(self, status: str) -> None:
        """Write every event to the file, and close it."""
        if self._events is not None:
            self._events.close()
            self._events = None


def _summary_writer() -> Any:
    try:
        with warnings.catch_warnings():  # what it imports adds filters
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise NotInstalledError(
            "the logger tensorboard needs a package that isn't installed",
            where="loggers",
            got=str(error),
            instead="pip install 'fabric-registry[tensorboard]'",
        ) from error
    return SummaryWriter


def _flat(params: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Name nested settings by their path; what TensorBoard can't hold becomes text."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{above}{name}/"))
        else:
            held = plain(value) if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            flat[f"{above}{name}"] = held if isinstance(held, bool | int | float | str) else str(held)
    return flat
