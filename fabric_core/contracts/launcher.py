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

        The ranks meet where it says: at the store of the process that started them (``agent_store``), or at one that
        rank 0 makes. That store may outlive a failed attempt, so that ``attempt`` counts the restarts: 0 where the
        system doesn't tell.

        Args:
            environment: The environment variables.

        Returns:
            The place, or ``None`` where this launcher's system did not start the process.

        Raises:
            LaunchError: The system did, and its variables are incomplete, contradict each other, or say what is
                impossible: a rank that is not below the number of ranks, or a port outside 1 to 65535.
        """

    @behaviour
    @abstractmethod
    def start(self, order: LaunchOrder) -> Any:
        """Start processes and wait for them.

        All that the order asks for is done or refused: the number of ranks is ``processes`` times ``nodes``, and a
        start method is kept. In each rank ``detect`` gives its place, and SIGINT and SIGTERM do what they do in a
        fresh process. A command is run again as it was typed, in the folder in which it was typed, even where the
        script has left that since; what this process printed before is shown before what the ranks print.

        It may be called again. However it ends, this process is then as it was: its environment, its signal handlers,
        the settings of PyTorch and of ``multiprocessing``. No rank is left where this process is told to end, by SIGINT
        or by SIGTERM, which ends it, and not as one that succeeded. Nor should there be, where a rank fails or this
        process is killed, what the ranks left: processes that they had started, temporary folders and semaphores of
        ``multiprocessing``.

        Returns:
            What the function returned on rank 0, however large, whatever the other ranks returned. A command does not
            return: the process exits with the exit code of its ranks.

        Raises:
            RankFailedError: A rank failed; every rank has ended.
            LaunchError: The processes could not be started, and none was: there are more nodes than it can start,
                new processes can't import the function (which was defined at a prompt, say), or there is no command
                that could be run again.
            KeyboardInterrupt: The user interrupted a function; every rank has ended.
        """

    @behaviour
    def setup_process(self, info: ProcessInfo) -> None:
        """Called in a process that ``detect`` recognised, once it takes part.

        It may share the cores of a node among its ranks, of which there may be more than cores; the number of threads
        stays as it is where ``OMP_NUM_THREADS`` says it.
        """

    @behaviour
    def check_peers(self, info: ProcessInfo) -> None:
        """Called about every second while this process waits for the others to come.

        A launcher that implements it notices within seconds; by default nobody does before the time is over.

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
        """Release what ``setup_process`` acquired, and undo what it set.

        A thread that waits for the end of whoever started the process may stay.
        """
