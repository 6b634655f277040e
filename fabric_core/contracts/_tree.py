"""A walk over nested values that copies only what changes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree

__all__ = ["map_tree"]

_LEAVES = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


def map_tree(data: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Apply a function to every tensor of a nested value; an unchanged part is the very same object.

    Args:
        data: A tensor, or a nesting of dicts, lists, tuples, named tuples, dataclasses and registered containers.
        function: Maps a tensor; returns its argument to leave it.
    """
    kind = type(data)
    if isinstance(data, torch.Tensor):
        return function(data)
    if kind in _LEAVES:
        return data
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return _map_dataclass(data, function)
    # An unregistered container is a leaf of pytree, whose registry has no public face in Python.
    if kind not in {dict, list, tuple} and _pytree._is_leaf(data):  # noqa: SLF001
        return data
    old, structure = _pytree.tree_flatten(data, is_leaf=lambda value: value is not data)
    new = [map_tree(leaf, function) for leaf in old]
    if all(after is before for after, before in zip(new, old, strict=True)):
        return data
    return _pytree.tree_unflatten(new, structure)


def _map_dataclass(data: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    changed = {}
    for field in dataclasses.fields(data):
        if not hasattr(data, field.name):
            continue
        old = getattr(data, field.name)
        new = map_tree(old, function)
        if new is not old:
            changed[field.name] = new
    if not changed:
        return data
    # Not `dataclasses.replace`: it calls `__init__` and `__post_init__`, which may compute or refuse.
    copy = object.__new__(type(data))
    for owner in type(data).__mro__:
        for slot in getattr(owner, "__slots__", ()):
            if slot not in {"__dict__", "__weakref__"} and hasattr(data, slot):
                object.__setattr__(copy, slot, getattr(data, slot))
    if hasattr(data, "__dict__"):
        copy.__dict__.update(data.__dict__)
    for name, value in changed.items():
        object.__setattr__(copy, name, value)
    return copy
