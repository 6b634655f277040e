"""A walk over nested values that copies only what changes."""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fabric_core._torch import tree_flatten, tree_is_leaf, tree_unflatten

__all__ = ["map_tree"]

_LEAVES = frozenset({str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device})


def map_tree(
    data: Any,
    function: Callable[[torch.Tensor], Any],
    objects: Callable[[Any], Any] | None = None,
) -> Any:
    """Apply a function to every tensor of a nested value; an unchanged part is the very same object.

    Args:
        data: A tensor, or a nesting of dicts, lists, tuples, named tuples, dataclasses and registered containers.
        function: Maps a tensor; returns its argument to leave it.
        objects: Maps whatever is no tensor, number, text, dict, list or tuple; returns its argument to let the walk go
            into it.
    """
    if isinstance(data, torch.Tensor):
        return function(data)
    kind = type(data)
    if kind in _LEAVES:
        return data
    # Plain containers are most of all batches: a loop of their own, for pytree takes ten times as long.
    if kind is dict:
        return _map_items(data, data.items(), function, objects)
    if kind is list:
        return _map_items(data, enumerate(data), function, objects)
    if kind is tuple:
        return tuple(_map_items(data, enumerate(data), function, objects))
    return _map_object(data, function, objects)


def _map_items(
    data: Any,
    items: Iterable[tuple[Any, Any]],
    function: Callable[[torch.Tensor], Any],
    objects: Callable[[Any], Any] | None,
) -> Any:
    new: Any = None
    traced = torch.compiler.is_compiling()  # Dynamo compares no tuples by identity; what it traces is copied
    for key, before in items:
        after = function(before) if isinstance(before, torch.Tensor) else map_tree(before, function, objects)
        if traced or after is not before:
            if new is None:
                new = list(data) if type(data) is tuple else data.copy()
            new[key] = after
    return data if new is None else new


def _map_object(data: Any, function: Callable[[torch.Tensor], Any], objects: Callable[[Any], Any] | None) -> Any:
    if objects is not None:
        mapped = objects(data)
        if mapped is not data:
            return mapped
    # An unregistered container is a leaf of pytree, whose registry has no public face in Python. Registered ones come
    # first, for they know best how they are made (those of transformers are dataclasses and dicts at once).
    if not tree_is_leaf(data):
        old, structure = tree_flatten(data, is_leaf=lambda value: value is not data)
        new = [map_tree(leaf, function, objects) for leaf in old]
        same = all(after is before for after, before in zip(new, old, strict=True))
        return data if same else tree_unflatten(new, structure)
    if isinstance(data, dict | UserDict):
        return _map_mapping(data, function, objects)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return _map_dataclass(data, function, objects)
    return data


def _map_mapping(data: Any, function: Callable[[torch.Tensor], Any], objects: Callable[[Any], Any] | None) -> Any:
    """Map a subclass of ``dict`` or ``UserDict``: their shallow copies have entries and attributes of their own."""
    result = data
    for key, old in data.items():
        new = map_tree(old, function, objects)
        if new is not old:
            if result is data:
                result = copy.copy(data)
            result[key] = new
    return result


def _map_dataclass(data: Any, function: Callable[[torch.Tensor], Any], objects: Callable[[Any], Any] | None) -> Any:
    changed = {}
    for field in dataclasses.fields(data):
        if not hasattr(data, field.name):
            continue
        old = getattr(data, field.name)
        new = map_tree(old, function, objects)
        if new is not old:
            changed[field.name] = new
    if not changed:
        return data
    # Not `dataclasses.replace`: it calls `__init__` and `__post_init__`, which may compute or refuse.
    result = object.__new__(type(data))
    for owner in type(data).__mro__:
        for slot in getattr(owner, "__slots__", ()):
            if slot not in {"__dict__", "__weakref__"} and hasattr(data, slot):
                object.__setattr__(result, slot, getattr(data, slot))
    if hasattr(data, "__dict__"):
        result.__dict__.update(data.__dict__)
    for name, value in changed.items():
        object.__setattr__(result, name, value)
    return result
