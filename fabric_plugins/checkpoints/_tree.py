"""A state tree apart: its tensors under keys, and everything else with room for them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fabric_core.contracts import walk_tensors
from fabric_core.errors import CheckpointError

__all__ = ["KeyPath", "fill", "find", "keys_of", "outline_of", "split"]

KeyPath = tuple[Any, ...]
"""The names and indices that lead through nested mappings, lists and tuples to a tensor."""


def split(tree: Mapping[str, Any], where: object) -> tuple[dict[str, Any], dict[KeyPath, torch.Tensor]]:
    """Give the outline of a tree, and its tensors under their key paths.

    Raises:
        CheckpointError: A tensor is of a class or layout that a record can't hold.
    """
    tensors = {}
    for path, tensor in walk_tensors(tree):
        local: Any = tensor
        if _is_dtensor(tensor):
            local = local.to_local()
        if type(local) not in {torch.Tensor, nn.Parameter, nn.Buffer} or local.layout is not torch.strided:
            raise CheckpointError(
                f"the entry {named(path)} can't be saved in this format",
                where=str(where),
                got=f"a {type(local).__name__} of layout {local.layout}",
                instead="a plain dense tensor, or the format single_file",
            )
        tensors[path] = tensor.detach()
    return outline_of(tree), tensors


def outline_of(tree: Any) -> Any:
    """Copy a tree with its tensors on the meta device."""
    if isinstance(tree, torch.Tensor):
        return torch.empty(tree.shape, dtype=tree.dtype, device="meta")
    if isinstance(tree, Mapping):
        return _like_mapping(tree, {name: outline_of(value) for name, value in tree.items()})
    if isinstance(tree, list | tuple):
        return _like_sequence(tree, [outline_of(value) for value in tree])
    return tree


def fill(outline: Any, tensors: Mapping[KeyPath, torch.Tensor], above: KeyPath = ()) -> Any:
    """Put tensors in the places of an outline's; where one is lacking, the outline's stays."""
    if isinstance(outline, torch.Tensor):
        return tensors.get(above, outline)
    if isinstance(outline, Mapping):
        return _like_mapping(outline, {name: fill(value, tensors, (*above, name)) for name, value in outline.items()})
    if isinstance(outline, list | tuple):
        return _like_sequence(outline, [fill(value, tensors, (*above, at)) for at, value in enumerate(outline)])
    return outline


def find(tree: Any, path: KeyPath) -> Any:
    """Give what a tree has at a key path, or ``None``."""
    for name in path:
        if isinstance(tree, Mapping):
            tree = tree.get(name)
        elif isinstance(tree, list | tuple) and isinstance(name, int) and name < len(tree):
            tree = tree[name]
        else:
            return None
    return tree


def keys_of(paths: Iterable[KeyPath]) -> dict[KeyPath, str]:
    """Name tensors by their key paths, joined by dots; those that would read alike get marks, in one order always."""
    alike: defaultdict[str, list[KeyPath]] = defaultdict(list)
    for path in paths:
        alike[".".join(map(str, path))].append(path)
    keys: dict[KeyPath, str] = {}
    taken = set(alike)
    for key in sorted(alike):
        first, *others = sorted(alike[key], key=repr)
        keys[first] = key
        for path in others:
            marked = f"{key}'"
            while marked in taken:
                marked += "'"
            taken.add(marked)
            keys[path] = marked
    return keys


def named(path: KeyPath) -> str:
    """Show a key path as one would write it."""
    return repr(path[0]) + "".join(f"[{step!r}]" for step in path[1:]) if path else "itself"


def _like_mapping(old: Mapping[Any, Any], new: dict[Any, Any]) -> Any:
    if all(new[name] is value for name, value in old.items()):
        return old
    if type(old) is dict or not isinstance(old, dict):
        return new
    copied = old.copy()
    for name, value in new.items():
        copied[name] = value
    return copied


def _like_sequence(old: Any, new: list[Any]) -> Any:
    if all(one is other for one, other in zip(old, new, strict=True)):
        return old
    if type(old) in {list, tuple, torch.Size}:
        return type(old)(new)
    made = getattr(type(old), "_make", None)
    return old if made is None else made(new)


def _is_dtensor(tensor: torch.Tensor) -> bool:
    return callable(getattr(tensor, "to_local", None)) and hasattr(tensor, "device_mesh")
