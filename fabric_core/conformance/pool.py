"""Ranks that stay up: a check on several processes costs milliseconds instead of an interpreter's start."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Final, Self

from torch.distributed import TCPStore

from fabric_core._torch import compiler

__all__ = ["RESOLVER", "VARIABLES", "RankHang", "RankPool", "RankRaised", "die_with_driver"]

VARIABLES: Final = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT",
)
"""The environment variables that a rank finds, as under ``torchrun``."""

_ADDRESS: Final = "127.0.0.1"
RESOLVER: Final = "timeout:1 attempts:1"
"""PyTorch asks for the name of each address that it connects to; by default a lost answer takes 5 s."""
_GRACE: Final = 2.0
"""How many seconds the other ranks have to come to an end after one failed."""
_DIED: Final = "the process died"


class RankHang(Exception):  # noqa: N818 - it is the rank that hangs
    """Ranks did not come back in time."""


class RankRaised(Exception):  # noqa: N818 - it is the rank that raised
    """A rank raised, or died; the cause is its exception, where it could travel.

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
        parents: The ranks may start processes of their own; such a pool must be closed before the driver ends.
    """

    def __init__(self, world_size: int, *, timeout: float = 60.0, parents: bool = False) -> None:
        self.world_size = world_size
        self._timeout = timeout * float(os.environ.get("FABRIC_TIMEOUT_SCALE", "1"))
        self._parents = parents
        self._ranks: list[tuple[Any, Connection, Connection]] = []
        self._store: TCPStore | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a function on every rank.

        Args:
            function: One that can be imported by name; it runs with the rank's environment.
            args: Its arguments; they must be picklable.

        Returns:
            What each rank returned, in their order.

        Raises:
            RankRaised: A rank raised, or died.
            RankHang: A rank did not come back in time; the message says where each rank was.
        """
        if not self._ranks:
            self._start()
        self._forget()
        message = pickle.dumps((function, args))
        for rank, (process, connection, stacks) in enumerate(self._ranks):
            _drain(stacks)
            try:
                connection.send_bytes(message)
            except OSError:
                trace = f"{_death(process)} after it had answered the call before\n"
                self._abandon()
                errors = [trace if one == rank else None for one in range(self.world_size)]
                raise RankRaised(rank, trace, errors) from None
        return self._collect()

    def close(self) -> None:
        """End the processes. The next call starts new ones."""
        for process, connection, stacks in self._ranks:
            connection.close()
            process.join(_GRACE)
            if process.is_alive():
                process.kill()
                process.join()
            stacks.close()
        self._ranks.clear()
        self._store = None

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
        # Otherwise each rank of each pool would import them: the compiler when an optimizer first steps, a second.
        context.set_forkserver_preload(["torch", compiler(), "fabric_core.fabric", "fabric_core.conformance.rules"])
        # An IPv4 socket of our own: on a dual one PyTorch looks up the name of each mapped address that connects, and
        # a resolver that doesn't know it may take seconds.
        listener = socket.create_server((_ADDRESS, 0), backlog=128)
        port = listener.getsockname()[1]
        self._store = TCPStore(
            _ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            stacks, late = context.Pipe(duplex=False)
            process = context.Process(
                target=_serve,
                args=(rank, self.world_size, self._store.port, theirs, late, self._timeout),
                daemon=not self._parents,
            )
            process.start()
            theirs.close()
            late.close()
            self._ranks.append((process, ours, stacks))

    def _forget(self) -> None:
        """Empty the store: each call is a job of its own, where who joins finds no address of an earlier one."""
        if self._store is not None:
            for key in self._store.list_keys():
                self._store.delete_key(key)

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
                except (EOFError, OSError):
                    answers[rank] = (False, (None, f"{_death(self._ranks[rank][0])}\n"))
                order.append(rank)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        failed = [rank for rank in order if not answers[rank][0]]
        if waiting and not failed:
            places = self._places(sorted(waiting))
            self._abandon()
            raise RankHang(f"ranks {sorted(waiting)} did not come back in {self._timeout:.0f} s\n{places}")
        if waiting or any(answers[rank][1][1].startswith(_DIED) for rank in failed):
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
            text = _drain(self._ranks[rank][2]).decode(errors="replace")
            texts.append(f"rank {rank}:\n{text or '  (it could not say where it is)'}")
        return "\n".join(texts)

    def _abandon(self) -> None:
        for process, _, _ in self._ranks:
            process.kill()
        self.close()


def _drain(stacks: Connection) -> bytes:
    """Take out what a rank wrote of its stack."""
    with contextlib.suppress(OSError):
        if stacks.poll():
            return os.read(stacks.fileno(), 1 << 16)
    return b""


def _death(process: Any) -> str:
    process.join(_GRACE)
    return f"{_DIED} (exit code {process.exitcode})"


def die_with_driver() -> None:
    """Let Linux kill this process when its driver is gone, even if it hangs: it could see no closed pipe."""
    driver = multiprocessing.parent_process()
    if sys.platform != "linux" or driver is None:
        return
    import fcntl

    # Where the driver ends, however it does, its end of this pipe closes, which sends the signal.
    fcntl.fcntl(driver.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(driver.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(driver.sentinel, fcntl.F_GETFL)
    fcntl.fcntl(driver.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)


def _serve(rank: int, world_size: int, port: int, connection: Connection, stacks: Connection, timeout: float) -> None:
    """Run what comes through the pipe until it closes."""
    die_with_driver()
    os.environ.setdefault("RES_OPTIONS", RESOLVER)
    values = (rank, rank, 0, world_size, world_size, _ADDRESS, port, "pool", True, 0)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what is shared with the server that forked this rank: each collection would look at it, and copy it
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            function, args = pickle.loads(connection.recv_bytes())  # noqa: S301 - from our own driver
            os.environ.update(zip(VARIABLES, map(str, values), strict=True))
            with _stack_when_late(stacks.fileno(), timeout):
                answer = _answer(function, args)
            connection.send_bytes(answer)


@contextlib.contextmanager
def _stack_when_late(pipe: int, seconds: float) -> Iterator[None]:
    faulthandler.dump_traceback_later(max(0.1, seconds - 0.5), file=pipe)
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
