"""From a user's state to a tree of tensors and plain values."""

from collections.abc import Mapping
from typing import Any, Final

import torch

from fabric_core.contracts import Agreement, Strategy, walk_tensors
from fabric_core.errors import CheckpointError
from fabric_core.running.state import RANKS, KeyPath, Part, is_dtensor, named

__all__ = ["collect"]

_SMALL: Final = 1 << 20
"""Up to how many bytes of tensors the states of an object on all ranks are compared; beyond, rank 0's is taken."""


def collect(
    state: Mapping[str, Any], parts: list[Part], strategy: Strategy, agree: Agreement, *, full: bool, where: object
) -> dict[str, Any]:
    """Turn a user's state into a tree; every rank must call it.

    Args:
        state: The user's state.
        parts: What in it has a state of its own.
        strategy: The bound strategy.
        agree: Lets a failure on one rank be every rank's.
        full: Whole tensors, on rank 0; else each rank's own parts.
        where: The path, for messages.

    Raises:
        CheckpointError: The ranks have different objects to save, or one of them can't give its state.
    """
    objects = [part for part in parts if part.kind == "object"]
    # What calls no collective comes first: who fails there fails before others wait for it.
    entries = agree.each(lambda: {part.path: part.value.state_dict() for part in objects}, where=where)
    signatures = agree.gather(lambda: [(part.path, part.kind) for part in parts], where=where)
    if any(one != signatures[0] for one in signatures):
        raise CheckpointError(
            "the ranks have different objects to save",
            where=str(where),
            got="; ".join(f"rank {rank}: {_few(one)}" for rank, one in enumerate(signatures)),
            instead="the same names and objects on every rank",
        )
    for part in objects:
        entries[part.path] = _of_all_ranks(entries[part.path], agree, where)
    for part in parts:
        if part.kind == "module":
            entries[part.path] = strategy.module_state(part.value, full)
        elif part.kind == "optimizer":
            entries[part.path] = strategy.optimizer_state(part.value, full)
    tree: dict[str, Any] = _replaced(dict(state), entries)
    return _gathered(tree, agree, where) if full else tree


def _few(signature: list[Any]) -> str:
    return ", ".join(f"{named(path)} ({kind})" for path, kind in signature[:8]) or "nothing"


def _replaced(value: Any, entries: Mapping[KeyPath, Any], above: KeyPath = ()) -> Any:
    """Copy containers that hold objects, with the objects' states in their places."""
    if above in entries:
        return entries[above]
    if not any(path[: len(above)] == above for path in entries):
        return value
    if isinstance(value, Mapping):
        return {name: _replaced(one, entries, (*above, name)) for name, one in value.items()}
    return [_replaced(one, entries, (*above, index)) for index, one in enumerate(value)]


def _of_all_ranks(entry: Any, agree: Agreement, where: object) -> Any:
    """Give an object's state as every rank has it, where that differs and is small."""
    if agree.world_size == 1:
        return entry
    tensors = [tensor for _, tensor in walk_tensors(entry)]
    mine = sum(one.nbytes for one in tensors) > _SMALL or any(is_dtensor(one) for one in tensors)
    if any(agree.gather(lambda: mine, where=where)):
        return entry
    every = agree.gather(lambda: entry, where=where)
    return entry if all(same(one, every[0]) for one in every) else {RANKS: every}


def same(one: Any, other: Any) -> bool:
    """Compare nested values, tensors bit by bit."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        if type(one) is not type(other) or one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one.cpu(), other.cpu())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return False


def _gathered(tree: dict[str, Any], agree: Agreement, where: object) -> dict[str, Any]:
    """Make whole what is sharded outside of models and optimizers, such as in a moving average; on rank 0."""
    sharded = {path: tensor for path, tensor in walk_tensors(tree) if is_dtensor(tensor)}
    unknown = [path for path, tensor in walk_tensors(tree) if type(tensor).__name__ == "ShardedTensor"]
    if unknown:
        raise CheckpointError(
            "a sharded tensor of this class can't be made whole",
            where=f"{where}, entry {named(unknown[0])}",
            instead="a DTensor, or a sharded checkpoint",
        )
    names = agree.gather(lambda: sorted(map(named, sharded)), where=where)
    everywhere = set.intersection(*map(set, names))
    lacking = sorted({name for some in names for name in some} - everywhere)
    if lacking and any(some and set(some) - everywhere for some in names):
        raise CheckpointError(
            "a sharded tensor is in the state of some ranks alone, so that nobody can gather it",
            where=f"{where}, entry {lacking[0]}",
            instead="the same entries on every rank",
        )
    wholes = {}
    for path in sorted(sharded, key=named):
        tensor: Any = sharded[path]
        whole = tensor.detach().full_tensor()
        if agree.rank == 0:
            wholes[path] = whole.cpu()
    return tree if agree.rank else _with_tensors(tree, wholes)


def _with_tensors(value: Any, tensors: Mapping[KeyPath, torch.Tensor], above: KeyPath = ()) -> Any:
    if isinstance(value, torch.Tensor):
        return tensors.get(above, value)
    if not any(path[: len(above)] == above for path in tensors):
        return value
    if isinstance(value, Mapping):
        return {name: _with_tensors(one, tensors, (*above, name)) for name, one in value.items()}
    if isinstance(value, list | tuple):
        new = [_with_tensors(one, tensors, (*above, index)) for index, one in enumerate(value)]
        return new if isinstance(value, list) else tuple(new)
    return value
