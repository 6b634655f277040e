"""Ranks that stay up: a check on several processes costs milliseconds instead of an interpreter's start."""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from torch.distributed import TCPStore

__all__ = ["RankHang", "RankPool", "RankRaised"]

_ADDRESS: Final = "127.0.0.1"
_GRACE: Final = 2.0
"""How many seconds the other ranks have to come to an end after one failed."""


class RankHang(BaseException):
    """Ranks did not come back in time.

    Not an ``Exception``: a generator of examples would otherwise try the same example again, on ranks that are gone.
    """


class RankRaised(Exception):  # noqa: N818 - it is the rank that raised
    """A rank raised; the cause is its exception, where it could travel.

    Args:
        rank: The first rank that raised.
        trace: Its traceback, as text.
        errors: For each rank the text of its exception, or ``None``.
    """

    def __init__(self, rank: int, trace: str, errors: list[str | None]) -> None:
        super().__init__(f"rank {rank} raised:\n{trace}")
        self.rank = rank
        self.trace = trace
        self.errors = errors


class RankPool:
    """Processes that run functions as the ranks of one job, again and again.

    Each rank finds the environment that ``torchrun`` would give it, so that ``Fabric(...).launch()`` joins.

    Args:
        world_size: The number of ranks.
        timeout: How many seconds a call may take; the environment variable ``FABRIC_TIMEOUT_SCALE`` multiplies it.
    """

    def __init__(self, world_size: int, *, timeout: float = 60.0) -> None:
        self.world_size = world_size
        self._timeout = timeout * float(os.environ.get("FABRIC_TIMEOUT_SCALE", "1"))
        self._calls = 0
        self._ranks: list[tuple[Any, Connection, Path]] = []
        self._store: TCPStore | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a function on every rank.

        Args:
            function: One that can be imported by name; it runs with the rank's environment.
            args: Its arguments; they must be picklable.

        Returns:
            What each rank returned, in their order.

        Raises:
            RankRaised: A rank raised.
            RankHang: A rank did not come back in time, or died; the message says where each rank was.
        """
        if not self._ranks:
            self._start()
        self._calls += 1
        message = pickle.dumps((self._calls, function, args))
        for _, connection, _ in self._ranks:
            connection.send_bytes(message)
        return self._collect()

    def close(self) -> None:
        """End the processes. The next call starts new ones."""
        for process, connection, _ in self._ranks:
            connection.close()
            process.join(_GRACE)
            if process.is_alive():
                process.kill()
                process.join()
        self._ranks.clear()
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Self:
        """End the processes after a ``with`` block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # Optimizers import torch._dynamo when they first step: a second for each rank of each pool.
        context.set_forkserver_preload(["torch", "torch._dynamo", "fabric_core.fabric", "fabric_core.conformance"])
        # An IPv4 socket of our own: on a dual one PyTorch looks up the name of each mapped address that connects, and
        # a resolver that doesn't know it may take seconds.
        listener = socket.create_server((_ADDRESS, 0), backlog=128)
        port = listener.getsockname()[1]
        self._store = TCPStore(
            _ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._folder = tempfile.TemporaryDirectory(prefix="fabric-pool-")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            stacks = Path(self._folder.name) / f"rank-{rank}"
            process = context.Process(
                target=_serve,
                args=(rank, self.world_size, self._store.port, theirs, str(stacks), self._timeout),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours, stacks))

    def _collect(self) -> list[Any]:
        answers: dict[int, tuple[bool, Any]] = {}
        order: list[int] = []
        deadline = time.monotonic() + self._timeout
        waiting = dict(enumerate(connection for _, connection, _ in self._ranks))
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            ready = wait(list(waiting.values()), timeout=remaining)
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                try:
                    answers[rank] = pickle.loads(waiting.pop(rank).recv_bytes())  # noqa: S301 - our own ranks
                except EOFError:
                    code = self._ranks[rank][0].exitcode
                    answers[rank] = (False, (None, f"the process died (exit code {code})\n"))
                order.append(rank)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        failed = [rank for rank in order if not answers[rank][0]]
        if waiting and not failed:
            places = self._places(sorted(waiting))
            self._abandon()
            raise RankHang(f"ranks {sorted(waiting)} did not come back in {self._timeout:.0f} s\n{places}")
        if waiting or any("the process died" in answers[rank][1][1] for rank in failed):
            self._abandon()
        if failed:
            errors = [None if rank not in failed else answers[rank][1][1] for rank in range(self.world_size)]
            cause, trace = answers[failed[0]][1]
            raise RankRaised(failed[0], trace, errors) from cause
        return [answers[rank][1] for rank in range(self.world_size)]

    def _places(self, ranks: list[int]) -> str:
        """Say where the ranks are; each wrote its stack shortly before the time was over."""
        time.sleep(0.2)
        texts = []
        for rank in ranks:
            stacks = self._ranks[rank][2]
            text = stacks.read_text() if stacks.exists() else ""
            texts.append(f"rank {rank}:\n{text or '  (it could not say where it is)'}")
        return "\n".join(texts)

    def _abandon(self) -> None:
        for process, _, _ in self._ranks:
            process.kill()
        self.close()


def _serve(rank: int, world_size: int, port: int, connection: Connection, stacks: str, timeout: float) -> None:
    """Run what comes through the pipe until it closes."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": _ADDRESS,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "pool",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            call, function, args = pickle.loads(connection.recv_bytes())  # noqa: S301 - from our own driver
            os.environ.update(environment, TORCHELASTIC_RESTART_COUNT=str(call))
            with _stack_when_late(stacks, timeout):
                answer = _answer(function, args)
            connection.send_bytes(answer)


@contextlib.contextmanager
def _stack_when_late(path: str, seconds: float) -> Iterator[None]:
    with Path(path).open("w") as file:
        faulthandler.dump_traceback_later(max(0.1, seconds - 0.5), file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((True, function(*args)))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the driver wants to know
        trace = traceback.format_exc()
        sys.stderr.flush()
        try:
            data = pickle.dumps((False, (error, trace)))
            pickle.loads(data)  # noqa: S301 - our own; some exceptions can't be made again
        except Exception:  # noqa: BLE001
            return pickle.dumps((False, (None, trace)))
        return data
