"""Every private or undocumented part of PyTorch that the plugins use, with the reason, and what would replace it."""

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["clear_unsynchronized", "reduction_finished", "storage_info", "unsynchronized"]


def reduction_finished(reducer: Any) -> bool:
    """Say whether a reducer of DDP that looks for unused parameters has averaged what it waited for.

    Such a one has nothing to rebuild; asked to, it only makes sure that its last reduction came to an end. A public way
    to ask for that would replace it.
    """
    try:
        reducer._rebuild_buckets()  # noqa: SLF001
    except RuntimeError:
        return False
    return True


def _parameters(unit: Any) -> Iterator[Any]:
    """List what FSDP2 knows of each parameter of one of its modules; it shows no gradient that is not reduced yet."""
    state = unit._get_fsdp_state()  # noqa: SLF001
    groups = getattr(state, "_fsdp_param_groups", None)
    for group in [state._fsdp_param_group] if groups is None else groups:  # noqa: SLF001 - up to PyTorch 2.11
        if group is not None:
            yield from group.fsdp_params


def _whole(one: Any) -> Any:
    return getattr(one, "_unsharded_param", None)


def unsynchronized(unit: Any) -> list[torch.Tensor]:
    """List the parameters of a unit of FSDP2 that have gradients which were not reduced over the ranks.

    They lie with the gathered parameters, until a backward pass reduces them. A public accessor would replace it.
    """
    return [
        one.sharded_param
        for one in _parameters(unit)
        if one.unsharded_accumulated_grad is not None or getattr(_whole(one), "grad", None) is not None
    ]


def clear_unsynchronized(unit: Any, held: set[int]) -> None:
    """Clear such gradients of the parameters with these identities, gathered or not."""
    for one in _parameters(unit):
        whole = _whole(one)
        if id(one.sharded_param) in held or id(whole) in held:
            one.unsharded_accumulated_grad = None
            if whole is not None:
                whole.grad = None


def storage_info() -> Any:
    """Give the class by which the metadata of ``torch.distributed.checkpoint`` says where a record is.

    Only PyTorch's own reader needs it; our checkpoints are read without. It would be replaced by a public class, or
    PyTorch's tools would no longer read our folders.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo
