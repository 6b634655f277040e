"""From a tree of tensors and plain values back into a user's state."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts import Strategy
from fabric_core.running.state import RANKS, KeyPath, Part, find, is_dtensor, loads_its_own_way

__all__ = ["Undo", "in_place", "restore", "restore_modules", "template"]


class Undo:
    """What restores objects to how they were, in the order in which they were changed."""

    def __init__(self) -> None:
        self._acts: list[Callable[[], Any]] = []

    def add(self, act: Callable[..., Any], *arguments: Any) -> None:
        """Note how to undo what comes next."""
        self._acts.append(lambda: act(*arguments))

    def run(self, error: BaseException) -> None:
        """Undo everything; where that fails, the error that was the reason gets a note."""
        while self._acts:
            try:
                self._acts.pop()()
            except Exception as again:  # noqa: BLE001 - the others are brought back all the same
                error.add_note(f"an object could not be brought back to how it was: {type(again).__name__}: {again}")


def template(parts: list[Part], outline: Mapping[str, Any], strategy: Strategy, *, modules: bool) -> dict[str, Any]:
    """Give the tensors that a sharded checkpoint is read into; those on the meta device are left out.

    Args:
        parts: What in the user's state has a state of its own.
        outline: What the checkpoint holds.
        strategy: The bound strategy.
        modules: Whether to read into the models' own tensors, and nothing else; otherwise everything else is read,
            aside: for an optimizer into room like its parameters, each a rank's own part, for it may have no state
            yet; for any other object into room for its sharded tensors.
    """
    tree: dict[str, Any] = outline_of(outline) if modules else {}
    for part in parts:
        try:
            saved = find(outline, part.path)
        except KeyError:
            continue
        if part.kind == "module":
            entry: Any = strategy.module_state(part.value, False) if modules else outline_of(saved)
        elif modules:
            continue
        elif part.kind == "optimizer":
            entry = {"state": _room_for_optimizer(part.value, saved, strategy)}
        else:
            entry = _room_for_shards(part.value.state_dict())
        place = tree
        for step in part.path[:-1]:
            place = place.setdefault(step, {})
        place[part.path[-1]] = entry
    return tree


def outline_of(tree: Any) -> Any:
    """Copy nested values with tensors on the meta device, and lists and tuples as dicts of their indices."""
    if isinstance(tree, torch.Tensor):
        return torch.empty(tree.shape, dtype=tree.dtype, device="meta")
    if isinstance(tree, Mapping):
        return {name: outline_of(one) for name, one in tree.items()}
    if isinstance(tree, list | tuple):
        return {index: outline_of(one) for index, one in enumerate(tree)}
    return tree


def _room_for_optimizer(optimizer: Optimizer, saved: Any, strategy: Strategy) -> dict[Any, Any]:
    own = strategy.optimizer_state(optimizer, False)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = saved.get("state", {}) if isinstance(saved, Mapping) else {}
    room = {}
    for index, entry in entries.items():
        if index in range(len(parameters)):
            fresh = {
                name: torch.empty_like(parameters[index].detach(), dtype=one.dtype)
                for name, one in entry.items()
                if isinstance(one, torch.Tensor) and one.shape == parameters[index].shape
            }
            # Into what it has already nothing is read: a failed load leaves it as it was.
            kept = own["state"].get(index, {})
            room[index] = {**{name: torch.empty_like(one) for name, one in kept.items() if is_dtensor(one)}, **fresh}
    return room


def _room_for_shards(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        return {name: _room_for_shards(one) for name, one in entry.items()}
    if isinstance(entry, list | tuple):
        return dict(enumerate(map(_room_for_shards, entry)))
    return torch.empty_like(entry) if is_dtensor(entry) else None


def restore(parts: list[Part], tree: Mapping[str, Any], strategy: Strategy, undo: Undo, *, full: bool) -> None:
    """Fill the objects of a user's state but for its models from a tree that was checked.

    Args:
        parts: What in the user's state has a state of its own.
        tree: What the checkpoint holds, read.
        strategy: The bound strategy.
        undo: Gets, for each object, what restores it.
        full: Whether tensors are whole.
    """
    # Those whose own code could refuse come first.
    for part in sorted(parts, key=lambda one: one.kind):
        try:
            entry = find(tree, part.path)
        except KeyError:
            continue
        value = part.value
        if part.kind == "optimizer":
            undo.add(value.__setstate__, {"state": value.state, "param_groups": value.param_groups})
            strategy.load_optimizer_state(value, entry, full)
        elif part.kind == "object":
            before = copy.deepcopy(value.state_dict())
            undo.add(value.load_state_dict, before)
            value.load_state_dict(_sharded_as(_of_this_rank(entry, strategy), before))


def restore_modules(
    parts: list[Part], tree: Mapping[str, Any], strategy: Strategy, undo: Undo, *, full: bool, strict: bool
) -> None:
    """Fill the models of a user's state, after everything that could fail; arguments as for ``restore``."""
    for part in parts:
        if part.kind != "module":
            continue
        try:
            entry = find(tree, part.path)
        except KeyError:
            continue
        if loads_its_own_way(part.value):
            before = {name: one.detach().clone() for name, one in _tensors_of(part.value).items()}
            undo.add(_copy_back, part.value, before)
        strategy.load_module_state(part.value, entry, full, strict)


def _tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _copy_back(module: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _tensors_of(module).items():
            tensor.copy_(before[name])


def _of_this_rank(entry: Any, strategy: Strategy) -> Any:
    """Take this rank's state of those of all; with another number of ranks they are dealt out in turn."""
    if isinstance(entry, Mapping) and set(entry) == {RANKS}:
        return entry[RANKS][strategy.collectives.rank % len(entry[RANKS])]
    return entry


def _sharded_as(value: Any, own: Any) -> Any:
    """Shard whole tensors as the object's own tensors in the same places are; without communication."""
    if isinstance(value, torch.Tensor):
        if not is_dtensor(own) or is_dtensor(value) or value.shape != own.shape:
            return value
        from torch.distributed.tensor import distribute_tensor

        local = value.to(own.to_local().device)
        return distribute_tensor(local, own.device_mesh, own.placements, src_data_rank=None)
    if type(value) is dict and isinstance(own, Mapping):
        return {name: _sharded_as(one, own.get(name)) for name, one in value.items()}
    if type(value) is list and isinstance(own, list):
        return [_sharded_as(one, own[at] if at < len(own) else None) for at, one in enumerate(value)]
    return value


def in_place(state: Any, tree: Any, parts: list[Part], above: KeyPath = ()) -> Any:
    """Put the plain values of a tree into a user's state, in place; a tuple is made anew, with the same objects."""
    inside = [part.path for part in parts if part.path[: len(above)] == above]
    if above in inside:
        return state
    if not inside and above:
        return tree
    if isinstance(state, dict) and isinstance(tree, Mapping):
        for name in list(state):
            if name in tree:
                state[name] = in_place(state[name], tree[name], parts, (*above, name))
        return state
    if isinstance(state, list | tuple) and isinstance(tree, list | tuple):
        new = [in_place(one, tree[at], parts, (*above, at)) for at, one in enumerate(state) if at < len(tree)]
        if isinstance(state, list):
            state[: len(new)] = new
            return state
        return type(state)(new) if type(state) is tuple else getattr(type(state), "_make", tuple)(new)
    return state
