"""Saving in the background: a copy in host memory, a thread that writes it, and errors that don't get lost."""

import atexit
import sys
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import torch

from fabric_core.contracts import Agreement, map_tensors, walk_tensors
from fabric_core.errors import CheckpointError

__all__ = ["Background", "SaveHandle"]

_STAGES_AGAIN: Final = torch.__version__ >= "2.13"
"""Whether PyTorch's stager can be used more than once: that of 2.12 closes itself, and then raises a ``KeyError``."""


class SaveHandle:
    """A checkpoint that is being written; the state was copied, so that training may go on.

    Args:
        future: The writing.
        path: Where to.
    """

    def __init__(self, future: "Future[None]", path: Any) -> None:
        self._future = future
        self.path = path
        """Where the checkpoint is written."""
        self._told = False

    def done(self) -> bool:
        """Say whether it is written, or has failed."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is there; every rank's own handle waits for all ranks.

        Args:
            timeout: How many seconds to wait; ``None`` waits as long as it takes.

        Raises:
            CheckpointError: It could not be written.
            TimeoutError: It takes longer.
        """
        error = self._future.exception(timeout)
        self._told = True
        if error is not None:
            raise error

    def _tell_at_exit(self) -> None:
        error = self._future.exception() if not self._told else None
        if error is not None:
            self._told = True
            print(  # noqa: T201 - nobody is left to catch it
                f"the checkpoint {self.path} was not saved: {error}", file=sys.stderr, flush=True
            )

    def __repr__(self) -> str:
        """Show path and progress."""
        return f"SaveHandle({str(self.path)!r}, {'done' if self.done() else 'writing'})"


class Background:
    """Writes checkpoints in a thread, one after another."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[SaveHandle] = deque()
        self._stager: Any = None
        _backgrounds.add(self)

    def stage(self, tree: dict[str, Any], *, reuse: bool) -> dict[str, Any]:
        """Copy all tensors of a tree to host memory.

        Args:
            tree: The tree.
            reuse: Take the memory of the copy before, which must not be in use any more.
        """
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        devices = {tensor.device.type for _, tensor in walk_tensors(tree)}
        pinned = bool(devices - {"cpu"}) and torch.accelerator.is_available()
        if self._stager is None or not reuse or not _STAGES_AGAIN:
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=pinned,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=pinned,
                )
            )
        staged: dict[str, Any] = self._stager.stage(map_tensors(tree, _shown))
        return staged

    def submit(self, write: Callable[[], None], path: Any) -> SaveHandle:
        """Write in the background."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="fabric-checkpoint")
        handle = SaveHandle(self._pool.submit(write), path)
        self._pending.append(handle)
        return handle

    def collect(self, agree: Agreement, *, wait: bool) -> None:
        """Look how earlier saves went; every rank calls it.

        Args:
            agree: Lets all ranks look at the same ones.
            wait: Wait for them; otherwise only those that are done on every rank are looked at.

        Raises:
            CheckpointError: One of them failed, and nobody was told yet.
        """
        if not self._pending:
            return
        if wait:
            done = len(self._pending)
        else:
            own = 0
            for handle in self._pending:
                if not handle.done():
                    break
                own += 1
            done = min(agree.gather(lambda: own, where="fabric.save"))
        failures = []
        for _ in range(done):
            handle = self._pending.popleft()
            error = handle._future.exception()  # noqa: SLF001 - its own
            if error is not None and not handle._told:  # noqa: SLF001
                failures.append((handle, error))
        for handle, _ in failures:
            handle._told = True  # noqa: SLF001
        if any(agree.gather(lambda: len(failures), where="fabric.save")):
            paths = ", ".join(str(handle.path) for handle, _ in failures) or "on another rank"
            error = failures[0][1] if failures else None
            raise CheckpointError(
                f"an earlier asynchronous save failed: {error.what if isinstance(error, CheckpointError) else error}",
                where=paths,
                instead="handle.result() right after a save tells of it earlier",
            ) from error

    def close(self) -> list[BaseException]:
        """Wait for everything, let go of thread and memory, and give the errors that nobody was told of."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)
        failures = []
        while self._pending:
            handle = self._pending.popleft()
            error = handle._future.exception()  # noqa: SLF001
            if error is not None and not handle._told:  # noqa: SLF001
                handle._told = True  # noqa: SLF001
                failures.append(error)
        self._stager = None
        return failures

    def tell_at_exit(self) -> None:
        """Print the errors that nobody was told of; the threads are through by then."""
        for handle in self._pending:
            handle._tell_at_exit()  # noqa: SLF001


_backgrounds: "weakref.WeakSet[Background]" = weakref.WeakSet()


def _at_exit() -> None:
    for background in list(_backgrounds):
        background.tell_at_exit()


atexit.register(_at_exit)


def _shown(tensor: torch.Tensor) -> torch.Tensor:
    """Give what a conjugated or negated view shows; the stager copies the bytes that lie beneath it."""
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor
