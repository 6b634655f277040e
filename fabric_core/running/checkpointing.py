"""What is saved and loaded: from a user's state to a tree of tensors and plain values, and back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from fabric_core.contracts import Precision, Strategy
from fabric_core.errors import CheckpointError

__all__ = ["PRECISION", "check_fits", "check_named", "collect", "restore", "restore_precision", "template"]

PRECISION: Final = "fabric.precision"
"""The entry of the tree that holds the precision's state, where it has one, such as the loss scale."""

_SHOWN: Final = 8
"""How many names a message shows."""


def check_named(state: Mapping[str, Any], where: str) -> None:
    """Refuse models, optimizers and the like that lie deeper in the state, where they would be taken for plain values.

    Raises:
        CheckpointError: There is one, or the state uses the reserved name.
    """
    if PRECISION in state:
        raise CheckpointError(f"the name {PRECISION!r} is reserved", where=where, instead="another name")
    for name, value in state.items():
        for part in tree_leaves(value):
            if part is not value and callable(getattr(part, "state_dict", None)):
                raise CheckpointError(
                    "what has a state of its own needs a name of its own in the state",
                    where=f"{where}, entry {name!r}",
                    got=f"a {type(part).__name__} in a {type(value).__name__}",
                    instead='an entry for each, such as {"first": first, "second": second}',
                )


def collect(
    state: Mapping[str, Any],
    strategy: Strategy,
    precision: Precision,
    *,
    full: bool,
    keep: Mapping[str, Callable[[str, Any], bool]],
) -> dict[str, Any]:
    """Turn a user's state into a tree; every rank must call it.

    Args:
        state: The user's own models, optimizers, objects with ``state_dict``, and plain values, under their names.
        strategy: The bound strategy.
        precision: The bound precision, whose own state becomes the entry ``PRECISION``.
        full: Whole tensors; else each rank's own parts.
        keep: For a name of the state, which of its entries to keep.
    """
    tree: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, nn.Module):
            entry: Any = strategy.module_state(value, full)
        elif isinstance(value, Optimizer):
            entry = strategy.optimizer_state(value, full)
        elif callable(getattr(value, "state_dict", None)):
            entry = value.state_dict()
        else:
            entry = value
        if name in keep:
            entry = {key: part for key, part in entry.items() if keep[name](key, part)}
        tree[name] = entry
    own = precision.state_dict()
    if own:
        tree[PRECISION] = own
    return tree


def template(state: Mapping[str, Any], outline: Mapping[str, Any], strategy: Strategy) -> dict[str, Any]:
    """Give the tensors that a checkpoint's parts are read into; every rank must call it.

    Args:
        state: The user's own models, optimizers, objects with ``state_dict``, and plain values, under their names.
        outline: What the checkpoint holds.
        strategy: The bound strategy.

    Returns:
        For each model its own tensors; for each optimizer what it has, and what it will have once the checkpoint is
        loaded: a fresh optimizer has no state yet. Each is a rank's own part, like the parameter that it belongs to.
    """
    tree: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, nn.Module):
            tree[name] = strategy.module_state(value, False)
        elif isinstance(value, Optimizer):
            own = strategy.optimizer_state(value, False)
            parameters = [parameter for group in value.param_groups for parameter in group["params"]]
            saved = outline.get(name, {}).get("state", {})
            tree[name] = {
                "state": {
                    index: {**_room(entry, parameters[index]), **own["state"].get(index, {})}
                    for index, entry in saved.items()
                    if index in range(len(parameters))
                }
            }
    return tree


def _room(entry: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make room for an optimizer's tensors of one parameter: where shapes agree, divided as the parameter is."""
    return {
        name: torch.empty_like(parameter.detach(), dtype=one.dtype)
        for name, one in entry.items()
        if isinstance(one, torch.Tensor) and one.shape == parameter.shape
    }


def check_fits(
    state: Mapping[str, Any],
    tree: Mapping[str, Any],
    strategy: Strategy,
    *,
    strict: bool,
    path: object,
) -> None:
    """Make sure that a tree, or the outline of one, can be loaded; every rank must call it.

    Args:
        state: As for ``template``.
        tree: What the checkpoint holds.
        strategy: The bound strategy.
        strict: Everything that the state asks for must be there, and models must have the very names of their states.
        path: The checkpoint's, for messages.

    Raises:
        CheckpointError: It can't.
    """
    missing = sorted(set(state) - set(tree))
    if missing and strict:
        raise CheckpointError(
            f"the checkpoint has no {_few(missing)}",
            where=str(path),
            got=f"it has {', '.join(map(repr, sorted(tree)))}",
            instead="ask for what it has, or strict=False",
        )
    for name, value in state.items():
        if name not in tree or not isinstance(value, nn.Module | Optimizer):
            continue
        if not isinstance(tree[name], Mapping):
            misfits = [f"it is no state of a model or optimizer, but a {type(tree[name]).__name__}"]
        elif isinstance(value, nn.Module):
            own = strategy.module_state(value, False)
            misfits = []
            if not _loads_its_own_way(value):
                misfits += _other_names(own, tree[name]) if strict else ()
                misfits += _other_shapes(own, tree[name], parts=strategy.capabilities.sharded)
        else:
            misfits = [*_other_groups(strategy.optimizer_state(value, False), tree[name])]
        if misfits:
            raise CheckpointError(
                f"the entry {name!r} doesn't fit the {type(value).__name__} that it is loaded into",
                where=str(path),
                got="; ".join(misfits),
                instead="a model and optimizers made as those that were saved; strict=False passes over names",
            )


def _loads_its_own_way(module: nn.Module) -> bool:
    """Say whether a model may take other names and shapes than its state has now, such as those of an older version.

    That is by a hook or a method that isn't PyTorch's; nothing public tells of them.
    """
    ways = [
        way
        for one in module.modules()
        for way in (
            type(one).load_state_dict,
            type(one)._load_from_state_dict,  # noqa: SLF001
            *(getattr(hook, "hook", hook) for hook in one._load_state_dict_pre_hooks.values()),  # noqa: SLF001
        )
    ]
    return not all(str(getattr(way, "__module__", "")).startswith("torch.") for way in ways)


def _other_names(own: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterable[str]:
    for what, names in (("missing", own.keys() - saved.keys()), ("unexpected", saved.keys() - own.keys())):
        if names:
            yield f"{what}: {_few(sorted(names))}"


def _other_shapes(own: Mapping[str, Any], saved: Mapping[str, Any], *, parts: bool) -> Iterable[str]:
    """Compare shapes; where parameters lie in parts, a plain tensor may be one, whose whole shape nobody knows."""
    for name, value in own.items():
        there = saved.get(name)
        if not isinstance(value, torch.Tensor) or not isinstance(there, torch.Tensor) or nn.parameter.is_lazy(value):
            continue
        if value.shape != there.shape and not (parts and type(value) is torch.Tensor):
            yield f"{name} is {tuple(there.shape)} there and {tuple(value.shape)} here"


def _other_groups(own: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterable[str]:
    sizes = [[len(group["params"]) for group in one.get("param_groups", ())] for one in (saved, own)]
    if sizes[0] != sizes[1]:
        yield f"parameters in each group: {sizes[0]} there and {sizes[1]} here"


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def restore(
    state: Mapping[str, Any],
    tree: Mapping[str, Any],
    strategy: Strategy,
    *,
    full: bool,
    strict: bool,
) -> dict[str, Any]:
    """Fill the objects of a user's state from a tree, which ``check_fits`` has seen.

    Returns:
        The plain values that the state asks for, as the tree has them.
    """
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if name not in tree:
            continue
        if isinstance(value, nn.Module):
            strategy.load_module_state(value, tree[name], full, strict)
        elif isinstance(value, Optimizer):
            strategy.load_optimizer_state(value, tree[name], full)
        elif callable(getattr(value, "load_state_dict", None)):
            value.load_state_dict(tree[name])
        else:
            plain[name] = tree[name]
    return plain


def restore_precision(tree: Mapping[str, Any], precision: Precision, *, path: object) -> None:
    """Give a precision its state back; a checkpoint without one, or a precision without one, is none the worse.

    Raises:
        CheckpointError: The state is another precision's.
    """
    if PRECISION not in tree or not precision.state_dict():
        return
    try:
        precision.load_state_dict(tree[PRECISION])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the state of the precision is not of the precision that is used now",
            where=f"{path}, entry {PRECISION!r}",
            got=repr(tree[PRECISION]),
            instead="the precision that the checkpoint was saved with",
        ) from error
