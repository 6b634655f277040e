"""When ranks fail: the first one shows its traceback, the others say in a line that they followed.

[Note: who is first] A rank that fails claims in the store of the job to be the first, before it closes a connection:
what fails on other ranks because of that comes later. A rank that was killed can't claim. So one whose connection broke
waits a moment: either the rank that is the cause claims, or whoever started the ranks notices that it died and ends the
others.
"""

import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final

from torch.distributed import DistError, PrefixStore, Store

from fabric_core.contracts import Launcher, World

__all__ = ["Failures"]

_PATIENCE: Final = 2.0
"""How many seconds a rank whose connection broke waits for the cause to claim, or to be ended."""
_ANSWER: Final = 3.0
"""How many seconds the store may take to answer."""
_LAST: Final = 3.0
"""How many seconds a rank that only follows waits to be ended, so that it is not seen to end first."""
_FIRST: Final = 0.5
"""How many seconds it waits where nobody is known to end it, so that the cause is shown before."""
_PAUSE: Final = 0.02
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
        self._store: Store | None = None
        self._first: int | None = None
        self.ended: bool = False
        hook: Any = sys.excepthook
        while isinstance(hook, Failures) and hook.ended:  # its Fabric failed, and somebody caught the error
            hook = hook.previous
        self.previous: Any = hook
        sys.excepthook = self

    def meet(self, store: Store) -> None:
        """Take the store in which ranks claim, once the ranks share one."""
        self._store = PrefixStore("failures", store)

    def claim(self, error: BaseException) -> int:
        """Give the rank that failed first: this one, if no other has claimed ([Note: who is first])."""
        if self._first is not None:
            return self._first
        own = self._first = self._rank
        if self._store is None:
            return own
        # In a thread, for a store on a host that was cut off answers never, whatever its timeout is.
        asking = threading.Thread(target=self._ask, args=(self._store, error), daemon=True)
        asking.start()
        asking.join(_PATIENCE + _ANSWER)
        return self._first

    def _ask(self, store: Store, error: BaseException) -> None:
        try:
            if _is_broken_connection(error):
                self._wait(store)
            self._first = int(store.compare_set("first", "", str(self._rank)))
        except (RuntimeError, ValueError):
            pass  # The store is gone: whoever made it ended before; better to say too much.

    def end(self, error: BaseException | None) -> None:
        """Stop watching, where nothing failed; else claim, for the connections are about to close."""
        self.ended = True
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            self.claim(error)
        elif sys.excepthook is self:
            sys.excepthook = self.previous

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
