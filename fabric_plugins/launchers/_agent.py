"""torchelastic's agent, which starts the ranks of this machine and ends all of them when one fails."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from fabric_plugins.launchers._reports import note_end

__all__ = ["run_agent"]

_TALKATIVE = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.multiprocessing.spawn",
)
"""What reports a failure once more, in its own words and with its own traceback."""


class _Agent(LocalElasticAgent):
    """Notices that all ranks of a function ended, and one of them without coming to the function's end."""

    gone: tuple[int, ...] = ()
    """The ranks that had ended when all was well the last time."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and not any(_runs(worker.id) for worker in worker_group.workers):
            again: RunResult = super()._monitor_workers(worker_group)  # some may have ended since
            if again.state != WorkerState.HEALTHY:
                return again
            failures = {
                worker.global_rank: ProcessFailure(worker.local_rank, worker.id, 0, "")
                for worker in worker_group.workers
            }
            return RunResult(state=WorkerState.FAILED, failures=failures)
        if result.state == WorkerState.HEALTHY:
            self.gone = tuple(worker.global_rank for worker in worker_group.workers if not _runs(worker.id))
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        note_end()
        super()._shutdown(death_sig, timeout)


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
        finally:
            handler.shutdown()
    return (result.failures, agent.gone) if result.is_failed() else ({}, ())


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
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
