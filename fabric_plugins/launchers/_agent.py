"""torchelastic's agent, which starts the ranks of this machine and ends all of them when one fails."""

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from fabric_plugins.launchers._reports import has_returned, note_end

__all__ = ["run_agent"]

_TALKATIVE = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.multiprocessing.spawn",
)
"""What reports a failure once more, in its own words and with its own traceback."""
_LOOK: Final = 0.02
"""How often, in seconds, the agent looks whether something that it ends has ended."""
_GRACE: Final = 1.0
"""How many seconds the processes of ranks that have ended have for their own end."""


class _Agent(LocalElasticAgent):
    """Notices that all ranks of a function have ended, and which of them did not come to the function's end.

    Each ends as soon as it has come there ([Note: the end of a rank]).
    """

    gone: tuple[int, ...] = ()
    """The ranks that had ended when all was well the last time."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        for worker in worker_group.workers:
            if _failed(worker.id):  # the forked workers of its loader hold the pipe by which torchelastic notices
                _signalled(worker.id, signal.SIGKILL)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and not any(_runs(worker.id) for worker in worker_group.workers):
            again: RunResult = super()._monitor_workers(worker_group)  # some may have ended since
            if again.state != WorkerState.HEALTHY:
                return again
            failures = {
                worker.global_rank: ProcessFailure(worker.local_rank, worker.id, 0, "")
                for worker in worker_group.workers
                if not has_returned(worker.global_rank)
            }
            if failures:
                return RunResult(state=WorkerState.FAILED, failures=failures)
            values = dict.fromkeys((worker.global_rank for worker in worker_group.workers), None)
            return RunResult(state=WorkerState.SUCCEEDED, return_values=values)
        if result.state == WorkerState.HEALTHY:
            self.gone = tuple(worker.global_rank for worker in worker_group.workers if not _runs(worker.id))
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        note_end()
        end = time.monotonic() + timeout
        # The ranks alone at first. torchelastic also tells the workers of their loaders, whose end would be an error in
        # a rank that is about to save a last checkpoint.
        if sys.platform.startswith("linux"):
            self.tell(death_sig, [worker.id for worker in self.get_worker_group().workers], timeout)
        super()._shutdown(death_sig, max(1, math.ceil(end - time.monotonic())))

    @staticmethod
    def tell(sign: signal.Signals, ranks: Sequence[int], seconds: float) -> None:
        """Send ranks a signal, and wait for them to end."""
        for pid in ranks:
            if _runs(pid):
                os.kill(pid, sign)
        end = time.monotonic() + seconds
        while any(map(_runs, ranks)) and time.monotonic() < end:
            time.sleep(_LOOK)

    def end_groups(self) -> None:
        """End what the ranks left running.

        The workers of a loader that a fork server of its own started, say, for which it waits, and they for it. Each
        rank is the leader of a group of processes, which outlives it.
        """
        groups = [worker.id for worker in self.get_worker_group().workers]
        for sign in (signal.SIGTERM, signal.SIGKILL):
            groups = [group for group in groups if _signalled(group, sign)]
            end = time.monotonic() + _GRACE
            while any(_signalled(group, 0) for group in groups) and time.monotonic() < end:
                time.sleep(_LOOK)


def run_agent(
    entry: Any,
    arguments: Sequence[Any],
    *,
    processes: int,
    run_id: str,
    address: str,
    start_method: str,
    shutdown_timeout: int,
    logs: str,
) -> tuple[Mapping[int, ProcessFailure], Sequence[int]]:
    """Run ranks to their end.

    Returns:
        The ranks that failed, by their numbers, in the order in which it was noticed; and those that had ended before.

    Raises:
        SignalException: This process was told to end; the ranks have ended.
    """
    handler = rendezvous.get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d", endpoint=f"{address}:0", run_id=run_id, min_nodes=1, max_nodes=1, local_addr=address
        )
    )
    spec = WorkerSpec(
        role="default",
        local_world_size=processes,
        entrypoint=entry,
        args=tuple(arguments),
        rdzv_handler=handler,
        max_restarts=0,
        monitor_interval=0.05,
        local_addr=address,
    )
    agent = _Agent(
        spec=spec,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        start_method=start_method,
        exit_barrier_timeout=0,
        shutdown_timeout=shutdown_timeout,
    )
    with _silent():
        try:
            result = agent.run()
        except BaseException:
            agent.end_groups()
            raise
        finally:
            handler.shutdown()
    if not result.is_failed():
        return {}, ()
    agent.end_groups()
    return result.failures, agent.gone


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Let torchelastic report no failure: the ranks and the caller do."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _runs(pid: int) -> bool:
    """Whether a process runs: one that has ended may wait for this one to ask how."""
    with contextlib.suppress(ChildProcessError):  # the fork server's, which asks
        if sys.platform.startswith("linux"):
            return _end_of(pid) is None
    return _exists(os.kill, pid, 0)


def _failed(pid: int) -> bool:
    """Whether a child of this process has ended, and not with exit code 0."""
    with contextlib.suppress(ChildProcessError):
        if sys.platform.startswith("linux"):
            return (ended := _end_of(pid)) is not None and ended.si_status != 0
    return False


def _end_of(pid: int) -> "os.waitid_result | None":
    """Give how a child of this process ended, and let it be asked again; ``None`` while it runs."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _signalled(group: int, sign: int) -> bool:
    """Send a group of processes a signal; gives whether there is one left."""
    return _exists(os.killpg, group, sign)


def _exists(send: Callable[[int, int], None], number: int, sign: int) -> bool:
    try:
        send(number, sign)
    except (ProcessLookupError, PermissionError):  # macOS denies what has ended
        return False
    return True
