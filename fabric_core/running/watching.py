"""Says where ranks wait for each other, when they have waited for long."""

import sys
import threading
import time
from collections.abc import Generator
from typing import Any, Final
from weakref import ref

from torch.distributed import Store

from fabric_core.binding import around
from fabric_core.collectives import World
from fabric_core.markers import hookimpl
from fabric_core.running.checking import frames_line
from fabric_core.running.failing import tell_alone

__all__ = ["WatchedWaits"]

_LOOKS: Final = 4
"""How often, in the time after which it speaks, the thread looks."""


class WatchedWaits:
    """An extension that says which ranks wait in a collective of Fabric's own and since when, and where one failed.

    A wait costs two assignments. One thread looks on; it finds the user's line only when there is something to say. It
    ends with the ``Fabric``.

    Args:
        after: How many seconds of waiting are worth a line on the standard error stream.
    """

    def __init__(self, after: float) -> None:
        self._after = after
        self.waiting: tuple[str, float] | None = None
        self._store: Store | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._user = 0

    @hookimpl
    def launched(self, world: World) -> None:
        """Start to look on, where there are others to wait for."""
        if world.world_size == 1 or world.open_store is None:
            return
        self._stop.clear()
        self._user = threading.get_ident()
        # A connection of its own: the other one is held by whoever waits in the store. And nothing of the Fabric's: one
        # that is dropped without teardown must be free to go.
        store: Any = world.open_store()
        self._store = store
        arguments = (ref(self), self._stop, self._after, self._user, store.clone(), world.global_rank, world.world_size)
        self._thread = threading.Thread(target=_look, args=arguments, daemon=True, name="fabric-watch")
        self._thread.start()
        world.closing.callback(self._end)

    def _end(self) -> None:
        self._store = None
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _wait(self, what: str) -> Generator[None, Any, Any]:
        self.waiting = (what, time.monotonic())
        try:
            return (yield)
        except Exception as error:
            where = f"{what} at {frames_line(sys._getframe())}"  # noqa: SLF001 - documented
            if self._store is not None:
                tell_alone(error, self._store, where)
            error.add_note(f"in {where}")
            raise
        finally:
            self.waiting = None

    @around.collectives
    def all_reduce(self) -> Generator[None, Any, Any]:
        """Note that this rank is in one."""
        return (yield from self._wait("all_reduce"))

    @around.collectives
    def all_gather(self) -> Generator[None, Any, Any]:
        """Note that this rank is in one."""
        return (yield from self._wait("all_gather"))

    @around.collectives
    def broadcast(self) -> Generator[None, Any, Any]:
        """Note that this rank is in one."""
        return (yield from self._wait("broadcast"))

    @around.collectives
    def broadcast_tensors(self) -> Generator[None, Any, Any]:
        """Note that this rank is in one."""
        return (yield from self._wait("broadcast_tensors"))

    @around.collectives
    def barrier(self, name: str | None) -> Generator[None, Any, Any]:
        """Note that this rank is in one."""
        return (yield from self._wait(f"barrier({name or ''})"))


def _look(
    watched: "ref[WatchedWaits]",
    stop: threading.Event,
    after: float,
    user: int,
    store: Store,
    rank: int,
    world_size: int,
) -> None:
    """Look on until the ``Fabric`` ends, or is gone."""
    said: float | None = None
    while not stop.wait(after / _LOOKS):
        one = watched()
        if one is None:
            return
        waiting = one.waiting
        del one
        if waiting is None or waiting[1] == said or time.monotonic() - waiting[1] < after:
            continue
        what, said = waiting
        line = frames_line(sys._current_frames().get(user))  # noqa: SLF001 - the documented way
        store.set(f"waiting/{rank}", f"{what} at {line}")
        others = [
            f"rank {other} in {store.get(f'waiting/{other}').decode()}"
            if store.check([f"waiting/{other}"])
            else f"rank {other} in no collective of Fabric's, or for a shorter time"
            for other in range(world_size)
        ]
        print(  # noqa: T201 - asked for by ``warn_after``
            f"[fabric, rank {rank}] has waited {time.monotonic() - said:.0f} s: {'; '.join(others)}",
            file=sys.stderr,
            flush=True,
        )
