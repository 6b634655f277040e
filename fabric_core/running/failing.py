"""When ranks fail: the first one shows its traceback, the others say in a line that they followed.

[Note: who is first] A rank that fails claims in the store of the job to be the first, before it closes a connection:
what fails on other ranks because of that comes later. A rank that was killed can't claim. So one whose connection broke
waits a moment: either the rank that is the cause claims, or whoever started the ranks notices that it died and ends the
others. A rank that comes to its end without a failure says so before it closes a connection, and whoever still waits
for it in a collective names it.
"""

import atexit
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Final

from torch.distributed import DistError, PrefixStore, Store

from fabric_core.contracts import Launcher, World
from fabric_core.errors import LaunchError
from fabric_core.running.checking import user_line

__all__ = ["Failures", "tell_alone"]

_PATIENCE: Final = 2.0
"""How many seconds a rank whose connection broke waits for the cause to claim, or to be ended."""
_ANSWER: Final = 3.0
"""How many seconds the store may take to answer."""
_LAST: Final = 3.0
"""How many seconds a rank that only follows waits to be ended, so that it is not seen to end first."""
_FIRST: Final = 0.5
"""How many seconds it waits where nobody is known to end it, so that the cause is shown before."""
_PAUSE: Final = 0.02
_PREFIX: Final = "failures"
_BROKEN: Final = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "/gloo/",
    "NCCL",
    "wait timeout",
)
"""What the errors of backends say that have no class of their own."""


class Failures:
    """Watches over one process: replaces ``sys.excepthook`` until the ``Fabric`` ends.

    Args:
        world: This process.
        launcher: What recognised it, and may tell of its failure where it started it.
    """

    def __init__(self, world: World, launcher: Launcher) -> None:
        # Not the world: a Fabric that is dropped must be free to go, though the hook stays.
        self._rank, self._ends_others = world.global_rank, world.agent_store
        self._launcher = launcher
        self._shared: Store | None = None
        self._store: Any = None  # of its methods PyTorch types not all
        self._first: int | None = None
        self.ended: bool = False
        hook: Any = sys.excepthook
        while isinstance(hook, Failures) and hook.ended:  # its Fabric failed, and somebody caught the error
            hook = hook.previous
        self.previous: Any = hook
        sys.excepthook = self

    def meet(self, store: Store) -> None:
        """Take the store in which ranks claim, once the ranks share one."""
        self._shared, self._store = store, PrefixStore(_PREFIX, store)

    def claim(self, error: BaseException) -> int:
        """Give the rank that failed first: this one, if no other has claimed ([Note: who is first])."""
        if self._first is not None:
            return self._first
        own = self._first = self._rank
        if self._store is None:
            return own
        store = self._store
        _bounded(lambda: self._ask(store, error), _PATIENCE + _ANSWER)
        return self._first

    def _ask(self, store: Store, error: BaseException) -> None:
        if _is_broken_connection(error):
            self._wait(store)
            if not isinstance(error, LaunchError) and (left := _left(store)):  # in a call that is not Fabric's
                error.add_note(_ended(left))
        self._first = int(store.compare_set("first", "", str(self._rank)))

    def watch_exit(self) -> None:
        """Say at the end of a script that doesn't tear down that this rank has ended."""
        atexit.register(self._leave)  # before what ends the process groups, which was registered before

    def end(self, error: BaseException | None) -> None:
        """Stop watching and say so, where nothing failed; else claim, for the connections are about to close."""
        self.ended = True
        atexit.unregister(self._leave)
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            self.claim(error)
            return
        self._leave()
        if sys.excepthook is self:
            sys.excepthook = self.previous

    def tell_alone(self, error: BaseException, call: str) -> None:
        """Name the ranks that ended while this one still waits for them in a call, if that is what raised an error."""
        if self._shared is not None:
            tell_alone(error, self._shared, f"{call} at {user_line()}")

    def _leave(self) -> None:
        store = self._store
        if store is not None and self._first is None:
            _bounded(lambda: store.append("left", f"{self._rank},"), _ANSWER)

    def __call__(self, kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        """Show a failure, as ``sys.excepthook`` does."""
        own, first = self._rank, self.claim(value)
        if first == own:
            if not self._launcher.report_failure(value, own):
                print(f"[rank {own}] failed:", file=sys.stderr)  # noqa: T201 - in place of the interpreter's own
                hook = self.previous
                while isinstance(hook, Failures):
                    hook = hook.previous
                hook(kind, value, trace)
                sys.stderr.flush()
            return
        # What started the ranks ends this one, or the cause has been shown by then.
        time.sleep(_LAST if self._ends_others else _FIRST)
        text = str(value).partition("\n")[0]
        print(f"[rank {own}] ended after rank {first} had failed: {kind.__name__}: {text}", file=sys.stderr)  # noqa: T201
        sys.stderr.flush()

    def _wait(self, store: Store) -> None:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and not store.check(["first"]):
            time.sleep(_PAUSE)


def tell_alone(error: BaseException, store: Store, where: str) -> None:
    """Name the ranks that ended while this one still waits for them, if that broke its connection.

    Args:
        error: What a backend raised.
        store: The one that the ranks share.
        where: The call, with the user's line.

    Raises:
        LaunchError: They ended, and none failed.
    """
    if not _is_broken_connection(error):
        return
    left: list[int] = []
    _bounded(lambda: left.extend(_left(PrefixStore(_PREFIX, store))), _ANSWER)
    if not left:
        return
    raise LaunchError(
        _ended(left),
        where=where,
        instead="the same calls of Fabric on every rank; Fabric(check=True) names the first that differs",
        ranks=left,
    ) from error


def _ended(left: list[int]) -> str:
    """Say it of the ranks that ended."""
    several = len(left) > 1
    return (
        f"rank {', '.join(map(str, left))} {'have' if several else 'has'} ended, and this rank still waits for "
        f"{'them' if several else 'it'}: {'their functions' if several else 'its function'} returned, or "
        f"{'their scripts' if several else 'its script'} came to the end"
    )


def _left(store: Store) -> list[int]:
    """Give the ranks that ended, unless one failed."""
    if store.check(["first"]) or not store.check(["left"]):
        return []
    return sorted({int(rank) for rank in store.get("left").decode().split(",") if rank})


def _bounded(act: Callable[[], object], seconds: float) -> None:
    """Use the store in a thread, for one on a host that was cut off answers never, whatever its timeout is."""

    def use() -> None:
        with suppress(RuntimeError, ValueError):  # it is gone: whoever made it ended before; better to say too much
            act()

    using = threading.Thread(target=use, daemon=True)
    using.start()
    using.join(seconds)


def _is_broken_connection(error: BaseException) -> bool:
    """Whether an error, or what it came from, is what a rank sees when another one is gone."""
    return any(
        isinstance(one, DistError) or (isinstance(one, RuntimeError) and any(part in str(one) for part in _BROKEN))
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
