"""What is saved and loaded: from a user's state to a tree of tensors and plain values, and back."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts import Precision, Strategy
from fabric_core.errors import CheckpointError

__all__ = ["PRECISION", "collect", "restore", "restore_precision", "template"]

PRECISION: Final = "fabric.precision"
"""The entry of the tree that holds the precision's state, where it has one, such as the loss scale."""


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

    Raises:
        CheckpointError: The state uses the reserved name.
    """
    if PRECISION in state:
        raise CheckpointError(f"the name {PRECISION!r} is reserved", where="fabric.save", instead="another name")
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


def restore(
    state: Mapping[str, Any],
    tree: Mapping[str, Any],
    strategy: Strategy,
    *,
    full: bool,
    strict: bool,
    path: object,
) -> dict[str, Any]:
    """Fill the objects of a user's state from a tree.

    Returns:
        The plain values that the state asks for, as the tree has them.

    Raises:
        CheckpointError: An entry of the state is not in the tree, and ``strict``.
    """
    missing = sorted(set(state) - set(tree))
    if missing and strict:
        raise CheckpointError(
            f"the checkpoint has no {', '.join(map(repr, missing))}",
            where=str(path),
            got=f"it has {', '.join(map(repr, sorted(tree)))}",
            instead="ask for what it has, or strict=False",
        )
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
