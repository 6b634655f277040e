"""What rules for checkpoint formats share: a state tree, whether two are the same, and what is asked of a path."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from fabric_core.conformance.bench import Bench
from fabric_core.conformance.rule import Broken
from fabric_core.contracts import ABOUT
from fabric_core.errors import CheckpointError

__all__ = [
    "CALLS",
    "REFUSED",
    "SAID",
    "Unwritable",
    "about_for",
    "answer",
    "checked",
    "files",
    "is_same",
    "outlines",
    "refused",
    "tree_for",
    "without_about",
]


def tree_for(bench: Bench, factor: float = 1.0) -> dict[str, Any]:
    """Give a state tree: of a model alone for a format that holds nothing else."""
    model = _model(factor)
    return {"model": model, **_plain(factor)} if bench.declared["plain_values"] else {"model": model}


def _model(factor: float) -> dict[str, torch.Tensor]:
    return {
        "weight": factor * torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "half": torch.full((2,), factor, dtype=torch.bfloat16),
        "count": torch.tensor([3, 5]),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(factor),
        "transposed": (factor * torch.arange(6.0)).reshape(2, 3).t(),
        "view": (factor * torch.arange(10.0))[2:8:3],
        "expanded": torch.full((1, 3), factor).expand(2, 3),
        "wild": torch.tensor([float("inf"), -float("inf"), -0.0, 3.4e38, 1e-45, 0.1, 16777217.0]),
        "wide": torch.tensor([0.1, 1e308, 9007199254740993.0], dtype=torch.float64),
        "large": torch.tensor([2**53 + 1, -(2**63)]),
        "complex": torch.tensor([1 + 2j, factor]),
        "flags": torch.tensor([True, False]),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    }


def _plain(factor: float) -> dict[str, Any]:
    return {
        "epoch": 7,
        "rate": 0.1,
        "huge": 2**70,
        "limits": [1e308, 5e-324, -0.0, float("inf")],
        "": "an empty key, and \u00e4\u4e2d\n text",
        "name": "text",
        "done": True,
        "nothing": None,
        "nested": {"list": [1, 2.5, "x"], "tuple": (0.9, ("a", None)), "empty": {}},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 11: {"average": torch.full((2, 3), factor)}},
            "param_groups": [{"betas": (0.9, 0.999), "params": [0, 11]}],
        },
    }


def _bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    whole = tensor.detach().cpu().contiguous().reshape(-1)
    return tuple(tensor.shape), whole.view(torch.uint8).tolist() if whole.numel() else []


def is_same(one: Any, other: Any) -> bool:
    """Say whether two trees, or values, are the same to the last bit, in types and shapes too."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and _bits(one) == _bits(other)
    if isinstance(one, dict):
        return isinstance(other, dict) and set(one) == set(other) and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(is_same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


CALLS: Final[Mapping[str, Callable[[Any, Path], Any]]] = {
    "read": lambda plugin, path: plugin.read(path, None),
    "outline": lambda plugin, path: plugin.outline(path),
    "describe": lambda plugin, path: plugin.describe(path),
    "tensors": lambda plugin, path: dict(plugin.tensors(path)),
    "read_trusted": lambda plugin, path: plugin.read_trusted(path),
}
"""What may be asked of a path."""
REFUSED: Final = object()


def answer(plugin: Any, call: str, path: Path, what: str) -> Any:
    """Ask, and give the answer, or ``REFUSED``."""
    try:
        return CALLS[call](plugin, path)
    except CheckpointError:
        return REFUSED
    except Exception as error:
        raise Broken(f"{call} of {what} raises {error!r}, and no CheckpointError") from error


def refused(plugin: Any, path: Path, what: str, *calls: str) -> None:
    """Ask, by every call unless some are named, and let each be refused."""
    for call in calls or CALLS:
        got = answer(plugin, call, path, what)
        if got is not REFUSED:
            raise Broken(f"{call} of {what} gives {got!r}")


def checked(plugin: Any, path: Path, what: str) -> bool:
    """Say whether ``check`` finds nothing wrong."""
    try:
        plugin.check(path, None)
    except CheckpointError:
        return False
    except Exception as error:
        raise Broken(f"check of {what} raises {error!r}, and no CheckpointError") from error
    return True


def files(path: Path) -> dict[Path, bytes]:
    """Give the files of a checkpoint, and their bytes."""
    return {file: file.read_bytes() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}


class Unwritable:
    """A value that no format can write."""

    def __reduce__(self) -> Any:
        raise RuntimeError("the kit's own: this can't be written")


def outlines(outlined: Any, whole: Any) -> bool:
    """Say whether an outline is that of a tree: types and shapes for tensors, and the values of all else."""
    if isinstance(whole, torch.Tensor):
        return isinstance(outlined, torch.Tensor) and (outlined.shape, outlined.dtype) == (whole.shape, whole.dtype)
    if isinstance(whole, dict):
        return (
            isinstance(outlined, dict)
            and set(outlined) == set(whole)
            and all(outlines(outlined[key], whole[key]) for key in whole)
        )
    return is_same(outlined, whole)


SAID: Final = b"the kit's own"
"""What a checkpoint says about itself."""


def about_for(factor: float) -> dict[str, Any]:
    """Give what a checkpoint says of itself."""
    return {"step": factor, "plan": {"strategy": SAID.decode(), "devices": [0, 1]}, "more": [None, True, "text"]}


def without_about(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a checkpoint says of itself."""
    return {name: one for name, one in tree.items() if name != ABOUT}
