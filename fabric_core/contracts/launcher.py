"""The contract of a launcher: starts the processes, or recognises that something else did."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fabric_core.collectives import ProcessInfo
from fabric_core.contracts._spec import Plugin
from fabric_core.contracts.capabilities import LauncherCapabilities
from fabric_core.markers import behaviour

__all__ = ["LaunchOrder", "Launcher"]


@dataclass(frozen=True, kw_only=True)
class LaunchOrder:
    """What a launcher is to start.

    Args:
        processes: The number of processes on this node.
        nodes: The number of nodes.
        start_method: How a function's processes are started, as ``multiprocessing`` names it; ``None`` is the
            launcher's own choice.
        function: What each process runs; ``None`` is the command that the user typed.
        args: The function's positional arguments.
    """

    processes: int
    nodes: int = 1
    start_method: str | None = None
    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()


class Launcher(Plugin, ABC):
    """Starts the processes, or recognises that something else started them."""

    kind = "launcher"

    capabilities: ClassVar[LauncherCapabilities] = LauncherCapabilities()
    """What the launcher declares."""

    @behaviour
    @abstractmethod
    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        """Read this process's place from the environment that started it.

        Args:
            environment: The environment variables.

        Returns:
            The place, or ``None`` where this launcher's system did not start the process.

        Raises:
            LaunchError: The system did, and its variables are incomplete or contradict each other.
        """

    @behaviour
    @abstractmethod
    def start(self, order: LaunchOrder) -> Any:
        """Start processes and wait for them.

        Returns:
            What the function returned on rank 0, however large, whatever the other ranks returned. A command does not
            return: the process exits with the exit code of its ranks.

        Raises:
            RankFailedError: A rank failed; every rank has ended.
            LaunchError: The processes could not be started.
        """

    @behaviour
    def setup_process(self, info: ProcessInfo) -> None:
        """Called in a process that ``detect`` recognised, once it takes part."""

    @behaviour
    def check_peers(self, info: ProcessInfo) -> None:
        """Called about every second while this process waits for the others to come.

        Raises:
            LaunchError: One of them will never come: it has ended.
        """

    @behaviour
    def report_failure(self, error: BaseException, rank: int) -> bool:
        """Called in the rank that failed first, before anything is shown.

        Returns:
            Whether whoever started the ranks will show the error; otherwise the rank itself does.
        """
        return False

    @behaviour
    def teardown(self) -> None:
        """Release what ``setup_process`` acquired."""
