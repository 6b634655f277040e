"""A right launcher of unlike construction: it forks ranks, and ends them by their process groups."""

import multiprocessing
import os
import signal
import socket
import threading
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, Final

from fabric_core.conformance.references import Surroundings
from fabric_core.contracts import LaunchOrder
from fabric_core.errors import LaunchError, RankFailedError

__all__ = ["Forking"]

_GRACE: Final = 5.0


class Forking(Surroundings):
    """Forks each rank, with the variables that it reads itself."""

    def start(self, order: LaunchOrder) -> Any:
        """Start, wait, and give rank 0's answer."""
        if order.nodes != 1 or order.function is None or order.start_method not in {None, "fork"}:
            raise LaunchError("only functions, on this node, by forking")
        context: Any = multiprocessing.get_context("fork")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ranks: dict[Any, Any] = {}
        answers: dict[Any, Any] = {}
        try:
            for rank in range(order.processes):
                ours, theirs = context.Pipe(duplex=False)
                ranks[ours] = context.Process(target=self.run_rank, args=(rank, order, port, theirs))
                ranks[ours].start()
                theirs.close()
            while len(answers) < len(ranks):
                ready: Any = wait([pipe for pipe in ranks if ranks[pipe] not in answers])
                for pipe in ready:
                    try:
                        good, value = pipe.recv()
                    except EOFError:
                        good, value = False, "it died"
                    if not good:
                        raise RankFailedError("a rank failed", got=value)
                    answers[ranks[pipe]] = value
        finally:
            self.end([rank for rank in ranks.values() if rank not in answers])
            for rank in ranks.values():
                rank.join()
            for pipe in ranks:
                pipe.close()
        return answers[next(iter(ranks.values()))]

    def end(self, ranks: list[Any]) -> None:
        """End ranks that haven't answered: let them run their exit handlers, and then end what is left."""
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGINT)
        for rank in ranks:
            rank.join(_GRACE)
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.join()

    def run_rank(self, rank: int, order: LaunchOrder, port: int, answers: Any) -> None:
        """Be a rank."""
        self.begin()
        places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
        counts = {"WORLD_SIZE": order.processes, "LOCAL_WORLD_SIZE": order.processes}
        os.environ.update({name: str(value) for name, value in {**places, **counts}.items()}, MASTER_ADDR="127.0.0.1")
        try:
            assert order.function is not None
            answer = True, order.function(*order.args)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent wants to know
            answer = False, repr(error)
        with suppress(BrokenPipeError):
            answers.send(answer)

    def begin(self) -> None:
        """Lead a process group, be told what a fresh process is told, and end where the parent does."""
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(os.getpid(), signal.SIGKILL)
