"""The sources of random numbers of a process: to seed, to keep and to put back."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["derived", "kept", "random_state", "seed_sources", "set_random_state"]


def _numpy() -> Any:
    try:
        import numpy as np
    except ImportError:
        return None
    return np


def seed_sources(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, on every device.

    Args:
        seed: From 0 to 2**64 - 1; NumPy's takes its lower 32 bits.
    """
    random.seed(seed)
    np = _numpy()
    if np is not None:
        np.random.seed(seed % 2**32)
    torch.manual_seed(seed if seed < 2**63 else seed - 2**64)


def derived(*numbers: int) -> int:
    """Give a seed from 0 to 2**64 - 1 that follows from several numbers, and looks unlike that of any others."""
    text = ",".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_state() -> dict[str, Any]:
    """Give the state of Python's, NumPy's and PyTorch's random numbers, and of the device's, as tensors and numbers.

    The device is the current one of the accelerator, once something has used it; NumPy's state is the legacy one.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    np = _numpy()
    if np is not None:
        kind, keys, position, has_gauss, cached = np.random.get_state()
        state["numpy"] = {
            "kind": str(kind),
            "keys": torch.tensor([int(key) for key in keys]),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        }
    device = _device_module()
    if device is not None:
        state["device"] = device.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what ``random_state`` gave; a source that is not here, or has no state there, is left as it is.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: It is no such state.
    """
    own = state["python"]
    random.setstate((own["version"], tuple(own["words"].tolist()), own["gauss"]))
    torch.set_rng_state(state["torch"])
    np = _numpy()
    if np is not None and "numpy" in state:
        own = state["numpy"]
        keys = np.array(own["keys"].tolist(), dtype=np.uint32)
        np.random.set_state((own["kind"], keys, own["position"], own["has_gauss"], own["cached"]))
    if "device" in state and torch.accelerator.is_available():
        getattr(torch, _accelerator()).set_rng_state(state["device"])


@contextmanager
def kept() -> Iterator[None]:
    """Put every source of the CPU back at the end."""
    python, own = random.getstate(), torch.get_rng_state()
    np = _numpy()
    legacy = None if np is None else np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(own)
        if np is not None:
            np.random.set_state(legacy)


def _accelerator() -> str:
    device = torch.accelerator.current_accelerator()
    return "cpu" if device is None else device.type


def _device_module() -> Any:
    """Give the module of the accelerator's device type, where it has been used: asking must not initialise it."""
    if not torch.accelerator.is_available():
        return None
    module = getattr(torch, _accelerator(), None)
    used = getattr(module, "is_initialized", None)
    return module if hasattr(module, "get_rng_state") and (used is None or used()) else None
