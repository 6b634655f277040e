"""Seeds for every source of random numbers, and their state in checkpoints."""

from collections.abc import Mapping
from typing import Any

from fabric_core.errors import CheckpointError, RequestError
from fabric_core.randomness import random_state, seed_sources, set_random_state

__all__ = ["RandomState", "seed_everything"]

_LARGEST = 2**32 - 1


def seed_everything(seed: int = 0, *, rank: int = 0) -> int:
    """Seed Python, NumPy and PyTorch, on every device.

    Args:
        seed: A whole number from 0 to 2**32 - 1.
        rank: Added to the seed, where every rank is to draw other numbers.

    Returns:
        The seed that was set.

    Raises:
        RequestError: The seed is out of bounds.
    """
    total = seed + rank
    if not 0 <= total <= _LARGEST:
        raise RequestError(
            "the seed is out of bounds",
            where="seed_everything",
            got=str(total),
            instead=f"0 to {_LARGEST}",
        )
    seed_sources(total)
    return total


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
