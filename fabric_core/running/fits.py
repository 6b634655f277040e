"""Whether what a checkpoint holds can be loaded into a user's state, which is asked before anything changes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts import Strategy
from fabric_core.errors import CheckpointError, CheckpointKeyError
from fabric_core.running.state import KeyPath, Part, find, loads_its_own_way, named

__all__ = ["check_fits"]

_SHOWN: Final = 8
"""How many names a message shows."""

_OTHER_SHAPES: Final = frozenset({"Adafactor", "LBFGS", "Muon"})
"""The optimizers of PyTorch with tensors of other shapes than their parameters' and single numbers."""

_NO_MOMENTS: Final = (str, bytes, Mapping)
"""What no optimizer of PyTorch keeps for a parameter."""

_NUMBERS: Final = (bool, int, float, torch.Tensor)


def check_fits(
    state: Mapping[str, Any],
    parts: list[Part],
    tree: Mapping[str, Any],
    strategy: Strategy,
    *,
    strict: bool,
    path: object,
) -> None:
    """Make sure that a tree, or the outline of one, can be loaded.

    Args:
        state: The user's state.
        parts: What in it has a state of its own.
        tree: What the checkpoint holds.
        strategy: The bound strategy.
        strict: Everything that the state asks for must be there, and models must have the very names of their states.
        path: The checkpoint's, for messages.

    Raises:
        CheckpointError: It can't.
        CheckpointKeyError: The checkpoint lacks an entry.
    """
    missing = [*(_lacking(state, parts, tree))]
    if missing and strict:
        raise CheckpointKeyError(
            f"the checkpoint has no {_few(missing)}",
            where=str(path),
            got=f"it has {', '.join(map(repr, sorted(map(str, tree))))}",
            instead="ask for what it has, or strict=False",
        )
    for part in parts:
        try:
            saved = find(tree, part.path)
        except KeyError:
            continue
        _refuse_meta(part, path)
        misfits = [*_misfits(part, saved, strategy, strict=strict)]
        if misfits:
            raise CheckpointError(
                f"the entry {named(part.path)} doesn't fit the {type(part.value).__name__} that it is loaded into",
                where=str(path),
                got="; ".join(misfits[:_SHOWN]),
                instead="a model and optimizers made as those that were saved; strict=False passes over names",
            )


def _lacking(state: Any, parts: list[Part], tree: Any, above: KeyPath = ()) -> Iterator[str]:
    """Give what the state asks for and the tree lacks."""
    inside = [part for part in parts if part.path[: len(above)] == above]
    if above and (not inside or any(part.path == above for part in inside)):
        return
    if isinstance(state, Mapping):
        for name, value in state.items():
            if not isinstance(tree, Mapping) or name not in tree:
                yield named((*above, name))
            else:
                yield from _lacking(value, parts, tree[name], (*above, name))
    elif isinstance(state, list | tuple):
        if not isinstance(tree, list | tuple) or len(tree) != len(state):
            yield f"{named(above)} with {len(state)} elements"
            return
        for index, value in enumerate(state):
            yield from _lacking(value, parts, tree[index], (*above, index))


def _refuse_meta(part: Part, path: object) -> None:
    if part.kind != "module":
        return
    tensors = [*part.value.named_parameters(), *part.value.named_buffers()]
    meta = [name for name, tensor in tensors if tensor.is_meta]
    if meta:
        raise CheckpointError(
            "the model has no memory for values yet: it was made on the meta device, and setup would draw new ones",
            where=f"{path}, entry {named(part.path)}",
            got=f"on the meta device: {_few(meta)}",
            instead="fabric.setup(model) first, and load after it",
        )


def _misfits(part: Part, saved: Any, strategy: Strategy, *, strict: bool) -> Iterator[str]:
    if part.kind == "object":
        return
    if not isinstance(saved, Mapping):
        yield f"it is no state of a model or optimizer, but a {type(saved).__name__}"
    elif part.kind == "optimizer":
        yield from _misfits_of_optimizer(part.value, strategy.optimizer_state(part.value, False), saved)
    elif not loads_its_own_way(part.value):
        own = strategy.module_state(part.value, False)
        if strict:
            yield from _other_names(own, saved)
        yield from _misfits_of_module(own, saved, parts=strategy.capabilities.sharded)


def _other_names(own: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterable[str]:
    for what, names in (("missing", own.keys() - saved.keys()), ("unexpected", saved.keys() - own.keys())):
        if names:
            yield f"{what}: {_few(sorted(map(repr, names)))}"


def _misfits_of_module(own: Mapping[str, Any], saved: Mapping[str, Any], *, parts: bool) -> Iterable[str]:
    """Compare shapes; where parameters lie in parts, a plain tensor may be one, whose whole shape nobody knows."""
    for name, value in own.items():
        if name not in saved or not isinstance(value, torch.Tensor) or nn.parameter.is_lazy(value):
            continue
        there = saved[name]
        if not isinstance(there, torch.Tensor):
            yield f"{name} is a tensor here, and a {type(there).__name__} there"
        elif value.shape != there.shape and not (parts and type(value) is torch.Tensor):
            yield f"{name} is {tuple(there.shape)} there and {tuple(value.shape)} here"
        elif there.is_complex() and not value.is_complex():
            yield f"{name} is complex there and real here"


def _misfits_of_optimizer(optimizer: Optimizer, own: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterable[str]:
    groups, state = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list | tuple) or not all(_is_group(one) for one in groups):
        yield "param_groups is no list of groups with 'params'"
        return
    sizes = [[len(group["params"]) for group in one] for one in (groups, own["param_groups"])]
    if sizes[0] != sizes[1]:
        yield f"parameters in each group: {sizes[0]} there and {sizes[1]} here"
        return
    for index, (there, here) in enumerate(zip(groups, own["param_groups"], strict=True)):
        for name, value in here.items():
            if name in there and _differs(value, there[name]):
                yield f"param_groups[{index}][{name!r}] is a {type(there[name]).__name__} there"
    if isinstance(state, Mapping):
        yield from _misfits_of_moments(optimizer, own, state, [one for group in groups for one in group["params"]])
    else:
        yield f"state is no dict, but a {type(state).__name__}"


def _misfits_of_moments(
    optimizer: Optimizer, own: Mapping[str, Any], state: Mapping[Any, Any], ids: list[Any]
) -> Iterable[str]:
    """Compare the states of parameters; ``ids`` are what the groups there call them, in order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    plain = type(optimizer).__module__.startswith("torch.optim") and type(optimizer).__name__ not in _OTHER_SHAPES
    if len(parameters) != len(ids):
        return  # an engine's, which keeps parameters in parts of its own; it alone knows what fits
    for key, entry in state.items():
        if key not in ids:
            yield f"state[{key!r}] belongs to no parameter of the groups there"
            continue
        if not isinstance(entry, Mapping):
            yield f"state[{key!r}] is no dict, but a {type(entry).__name__}"
            continue
        parameter = parameters[ids.index(key)]
        mine = own["state"].get(key, {}) if isinstance(own.get("state"), Mapping) else {}
        for name, value in entry.items():
            problem = _misfit_of_moment(value, parameter, mine.get(name), plain=plain)
            if problem:
                yield f"state[{key!r}][{name!r}] {problem}"


def _is_group(group: Any) -> bool:
    return isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple)


def _differs(here: Any, there: Any) -> bool:
    """Say whether a setting is of another sort, such as text for a number."""
    if isinstance(here, _NUMBERS):
        return not isinstance(there, _NUMBERS) and there is not None
    if isinstance(here, list | tuple):
        return not isinstance(there, list | tuple)
    return here is not None and isinstance(here, str) != isinstance(there, str)


def _misfit_of_moment(value: Any, parameter: torch.Tensor, mine: Any, *, plain: bool) -> str | None:
    if not isinstance(value, torch.Tensor):
        tensor = isinstance(mine, torch.Tensor) and not isinstance(value, bool | int | float)
        return f"is a {type(value).__name__}" if tensor or (plain and isinstance(value, _NO_MOMENTS)) else None
    if value.is_complex() and not parameter.is_complex():
        return "is complex, and its parameter is real"
    if value.dim() == 0 or (isinstance(mine, torch.Tensor) and mine.shape == value.shape):
        return None
    if (plain or isinstance(mine, torch.Tensor)) and value.shape != parameter.shape:
        return f"is of shape {tuple(value.shape)}, and its parameter of {tuple(parameter.shape)}"
    return None


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
