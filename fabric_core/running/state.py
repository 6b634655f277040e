"""What has a state of its own in a user's state, and where."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from fabric_core._torch import loading_hooks

__all__ = ["RANKS", "KeyPath", "Part", "find", "is_dtensor", "loads_its_own_way", "named", "parts_of"]

KeyPath = tuple[Any, ...]
"""The names and indices that lead through nested dicts, lists and tuples."""

RANKS: Final = "fabric.ranks"
"""The only entry of the state of an object that differs among the ranks: a list with each rank's."""


@dataclass(frozen=True)
class Part:
    """An object with a state of its own, somewhere in a user's state."""

    path: KeyPath
    value: Any

    @property
    def kind(self) -> str:
        """What it is to a strategy."""
        if isinstance(self.value, nn.Module):
            return "module"
        return "optimizer" if isinstance(self.value, Optimizer) else "object"


def parts_of(state: Any, own: Callable[[Any], Any], above: KeyPath = ()) -> Iterator[Part]:
    """Find what has a state of its own in nested dicts, lists and tuples; ``own`` takes off what was put round it."""
    value = own(state) if above and not _is_container(state) else state
    if isinstance(value, nn.Module | Optimizer) or callable(getattr(value, "state_dict", None)):
        yield Part(above, value)
    elif isinstance(state, Mapping):
        for name, one in state.items():
            yield from parts_of(one, own, (*above, name))
    elif isinstance(state, list | tuple):
        for index, one in enumerate(state):
            yield from parts_of(one, own, (*above, index))


def _is_container(value: Any) -> bool:
    return type(value) in {dict, list, tuple}


def named(path: KeyPath) -> str:
    """Show a key path as one would write it."""
    return repr(path[0]) + "".join(f"[{step!r}]" for step in path[1:]) if path else "the state itself"


def find(tree: Any, path: KeyPath) -> Any:
    """Give what a tree has at a key path.

    Raises:
        KeyError: It has nothing there.
    """
    for step in path:
        if (isinstance(tree, Mapping) and step in tree) or (
            isinstance(tree, list | tuple) and isinstance(step, int) and step < len(tree)
        ):
            tree = tree[step]
        else:
            raise KeyError(named(path))
    return tree


def is_dtensor(tensor: Any) -> bool:
    """Say whether a tensor is sharded or replicated over a mesh."""
    module = sys.modules.get("torch.distributed.tensor")  # where it isn't imported, there is none
    return module is not None and isinstance(tensor, module.DTensor)


def loads_its_own_way(module: nn.Module) -> bool:
    """Say whether a model may take other names and shapes than its state has now, such as those of an older version.

    That is by a hook or a method that isn't PyTorch's; nothing public tells of them.
    """
    ways = [way for one in module.modules() for way in loading_hooks(one)]
    return not all(str(getattr(way, "__module__", "")).startswith("torch.") for way in ways)
