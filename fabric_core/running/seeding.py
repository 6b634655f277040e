"""Seeds for every source of random numbers, and their state in checkpoints."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from fabric_core.errors import CheckpointError, RequestError
from fabric_core.randomness import random_state, seed_sources, set_random_state

__all__ = ["RandomState", "last_seed", "seed_everything"]

_logger = logging.getLogger("fabric_core")

_LARGEST = 2**32 - 1


_last: int | None = None


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True, *, rank: int = 0) -> int:
    """Seed Python, NumPy and PyTorch, on every device; processes that ``launch(function)`` starts begin with it too.

    Args:
        seed: A whole number from 0 to 2**32 - 1; ``None`` is 0.
        workers: As in Lightning Fabric; a loader's workers are seeded, for each rank apart, with and without it, where
            the loader was set up.
        verbose: Say the seed to the logger ``fabric_core``, on the first rank.
        rank: Added to the seed, where every rank is to draw other numbers.

    Returns:
        The seed that was set.

    Raises:
        RequestError: The seed is out of bounds.
    """
    global _last  # noqa: PLW0603 - describes PyTorch's generator, which is as global
    del workers
    total = (0 if seed is None else seed) + rank
    if not 0 <= total <= _LARGEST:
        raise RequestError(
            "the seed is out of bounds",
            where="seed_everything",
            got=str(total),
            instead=f"0 to {_LARGEST}",
        )
    seed_sources(total)
    _last = total
    if verbose and rank == 0:
        _logger.info("Seed set to %d", total)
    return total


def last_seed() -> int | None:
    """Give what this process was last seeded with, if PyTorch was not seeded by other means since."""
    return _last if _last is not None and torch.initial_seed() == _last else None


class RandomState:
    """The random numbers of this process, as something that is saved: Python's, NumPy's, PyTorch's and the device's."""

    def state_dict(self) -> dict[str, Any]:
        """Give their state, as tensors and numbers."""
        return random_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on drawing where ``state_dict`` was asked.

        Raises:
            CheckpointError: It is no such state.
        """
        try:
            set_random_state(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(
                f"this is no state of random numbers: {error}",
                where="load_state_dict of fabric.random_state",
                got=", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__,
                instead="what a checkpoint holds that was saved with fabric.random_state",
            ) from error
