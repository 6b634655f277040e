"""Functions that run on the first of all ranks only."""

import logging
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar, cast, overload

import torch.distributed as dist

from fabric_core.running.launching import environment

__all__ = ["rank_zero_deprecation", "rank_zero_info", "rank_zero_only", "rank_zero_warn"]

P = ParamSpec("P")
R = TypeVar("R")

_VARIABLES: Final = ("RANK", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK")
"""What launchers and clusters call the rank, for the time before a process group is there."""

_logger = logging.getLogger("fabric_core")


class _RankZeroOnly:
    """Makes a function run on rank 0 only.

    ``rank_zero_only.rank`` is this process's rank: that of PyTorch's process group; before there is one, what the
    launcher says; or what a program set it to.
    """

    _set: int | None = None

    @property
    def rank(self) -> int:
        """This process's rank."""
        if self._set is not None:
            return self._set
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank()
        variables = environment()
        return next((int(variables[name]) for name in _VARIABLES if variables.get(name, "").isdecimal()), 0)

    @rank.setter
    def rank(self, rank: int | None) -> None:
        self._set = rank

    @overload
    def __call__(self, fn: Callable[P, R]) -> Callable[P, R | None]: ...
    @overload
    def __call__(self, fn: Callable[P, R], default: R) -> Callable[P, R]: ...
    def __call__(self, fn: Callable[P, R], default: R | None = None) -> Callable[P, Any]:
        """Wrap a function.

        Args:
            fn: The function.
            default: What it returns on the other ranks.
        """

        @wraps(fn)
        def on_rank_zero(*args: P.args, **kwargs: P.kwargs) -> R | None:
            return fn(*args, **kwargs) if self.rank == 0 else default

        return on_rank_zero


rank_zero_only: Final = _RankZeroOnly()
"""A decorator: the function runs on rank 0, and gives ``None`` or a default on the others."""


def rank_zero_info(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Say something to the logger ``fabric_core``, on rank 0; arguments are those of ``logging.Logger.info``."""
    if rank_zero_only.rank == 0:
        _logger.info(*args, stacklevel=max(1, stacklevel - 2), **kwargs)


def rank_zero_warn(message: str | Warning, stacklevel: int = 4, **kwargs: Any) -> None:
    """Warn, on rank 0; arguments are those of ``warnings.warn``."""
    if rank_zero_only.rank == 0:
        warnings.warn(cast("Any", message), stacklevel=max(1, stacklevel - 2), **kwargs)


def rank_zero_deprecation(message: str | Warning, stacklevel: int = 5, **kwargs: Any) -> None:
    """Warn of what will go, on rank 0."""
    kwargs.setdefault("category", DeprecationWarning)
    rank_zero_warn(message, stacklevel=stacklevel, **kwargs)
