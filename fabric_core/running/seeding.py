"""Seeds for every source of random numbers."""

import random

import torch

from fabric_core.errors import RequestError

__all__ = ["seed_everything"]

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
    random.seed(total)
    try:
        import numpy as np
    except ImportError:
        pass
    else:
        np.random.seed(total)  # noqa: NPY002 - the legacy state is the one that users' code draws from
    torch.manual_seed(total)
    return total
