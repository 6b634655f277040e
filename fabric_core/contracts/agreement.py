"""Acts of several ranks that succeed or fail on all of them."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from fabric_core.collectives import Collectives
from fabric_core.errors import CheckpointError

__all__ = ["Agreement"]

_T = TypeVar("_T")


class Agreement:
    """Lets every rank act, and raises on every rank where one of them failed, so that none waits for it.

    Every rank makes the same calls in the same order. An error of any class, rank 0's included, becomes a
    ``CheckpointError`` on all ranks: the rank that failed raises its own, the others one that names that rank.

    Args:
        collectives: What the ranks exchange their outcomes with.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    @property
    def rank(self) -> int:
        """This process among the others, from 0."""
        return self._collectives.rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self._collectives.world_size

    def gather(self, act: Callable[[], _T], *, where: object) -> list[_T]:
        """Act on every rank, and give what it returned on each, in the order of the ranks.

        Args:
            act: What to do; its result is picklable. It calls no collective, or the same ones on every rank.
            where: The path, for messages.

        Raises:
            CheckpointError: It failed on a rank.
        """
        result, failure = _attempt(act, where)
        if self.world_size == 1:
            if failure is not None:
                raise failure
            return [result]
        outcomes = self._exchange((result, None if failure is None else _portable(failure)))
        if failure is not None:
            raise failure
        for rank, (_, error) in enumerate(outcomes):
            if error is not None:
                raise _from_rank(error, rank)
        return [one for one, _ in outcomes]

    def each(self, act: Callable[[], _T], *, where: object) -> _T:
        """Act on every rank, and give what it returned here; what it returns need not be picklable."""
        kept: list[_T] = []
        self.gather(lambda: kept.append(act()), where=where)
        return kept[0]

    def on_zero(self, act: Callable[[], _T], *, where: object) -> _T:
        """Act on rank 0 alone, and give its result, which is picklable, on every rank."""
        result, failure = _attempt(act, where) if self.rank == 0 else (None, None)
        if self.world_size > 1:
            sent = self._collectives.broadcast((result, None if failure is None else _portable(failure)), 0)
            if self.rank != 0:
                result, failure = sent
                failure = None if failure is None else _from_rank(failure, 0)
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value] # there is one where nothing failed

    def _exchange(self, value: Any) -> list[Any]:
        # One after another: objects travel over any backend, also one that has no collectives for tensors of the CPU.
        return [self._collectives.broadcast(value, rank) for rank in range(self.world_size)]


def _attempt(act: Callable[[], _T], where: object) -> tuple[Any, CheckpointError | None]:
    try:
        return act(), None
    except CheckpointError as error:
        return None, error
    except Exception as error:  # noqa: BLE001 - whatever it is, every rank is told of it
        line = next(iter(str(error).strip().splitlines()), "")
        wrapped = CheckpointError(f"{type(error).__name__}: {line}" if line else type(error).__name__, where=str(where))
        wrapped.__cause__ = error
        return None, wrapped


def _portable(error: CheckpointError) -> CheckpointError:
    """Give the error, or its text where it holds something that can't travel."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - just made
    except Exception:  # noqa: BLE001 - whatever an object's own code raises
        return CheckpointError(str(error))
    return error


def _from_rank(error: CheckpointError, rank: int) -> CheckpointError:
    error.what = f"on rank {rank}: {error.what}"
    return error
