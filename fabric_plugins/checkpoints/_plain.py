"""Whether a state can be read again, which is asked before it is written."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fabric_core.contracts import map_tensors
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints._tree import named

__all__ = ["check_readable"]


def check_readable(tree: Mapping[str, Any], path: object) -> None:
    """Write and read everything but the tensors, in memory.

    Raises:
        CheckpointError: Something would need code to be read; names it.
    """
    if _comes_back(tree):
        return
    key_path, value = _culprit(tree)
    raise CheckpointError(
        f"the entry {named(key_path)} can't be saved: reading it again would need code",
        where=str(path),
        got=f"{type(value).__module__}.{type(value).__qualname__}: {_shown(value)}",
        instead="tensors, numbers, text, and plain dicts, lists, tuples and sets of them: value.item() or"
        " torch.from_numpy(value) of what is NumPy's, str(path), date.isoformat(), dict(value), list(value)",
    )


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:  # noqa: BLE001 - an object's own code; the message is about something else
        return "(it has no readable form)"


def _comes_back(value: Any) -> bool:
    memory = io.BytesIO()
    try:
        torch.save(map_tensors(value, lambda one: None if type(one) in {torch.Tensor, nn.Parameter} else one), memory)
        memory.seek(0)
        torch.load(memory, weights_only=True)
    except Exception:  # noqa: BLE001 - whatever an object's own code raises, it doesn't come back
        return False
    return True


def _culprit(tree: Any, above: tuple[Any, ...] = ()) -> tuple[tuple[Any, ...], Any]:
    """Find the innermost value that doesn't come back, and where it is."""
    for step, value in _parts(tree):
        if not _comes_back(value):
            return _culprit(value, (*above, step))
    return above, tree


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
