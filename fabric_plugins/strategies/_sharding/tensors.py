"""How a tensor is divided among the ranks: layouts, parts of whole tensors, norms of gradients."""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from fabric_core.errors import SetupError

__all__ = ["distribute", "divided", "grad_of", "layout", "like", "local_part", "norm_of", "reduce_partial_gradients"]


def like(value: Any, target: Any) -> Any:
    """Distribute a whole tensor as a parameter of the same shape is; leave anything else."""
    from torch.distributed.tensor import DTensor

    if not isinstance(target, DTensor) or not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != target.shape:
        return value
    local = value.detach().to(target.to_local().device)
    return distribute(local, target)


def divided(name: str, value: Any, parameter: torch.Tensor) -> Any:
    """Divide an optimizer's state as its parameter is.

    Raises:
        SetupError: Nobody can tell how it is divided.
    """
    result = like(value, parameter)
    if result is value and type(value) in _WHOLE and value.dim() > 0 and layout(parameter) != parameter.device:
        raise SetupError(
            f"the optimizer's state {name!r} can't be divided among the ranks: it is neither a single number nor of its"
            " parameter's shape",
            where="the state of an optimizer, under a strategy that shards parameters",
            got=f"shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}",
            instead="an optimizer without such state, or begin with a fresh one",
        )
    return result


_WHOLE: Final = frozenset({torch.Tensor, nn.Parameter})


def distribute(whole: torch.Tensor, target: Any) -> Any:
    """Cut out this rank's part; without communication, as every rank has the whole."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


def layout(tensor: torch.Tensor) -> Any:
    from torch.distributed.tensor import DTensor

    return tensor.device_mesh if isinstance(tensor, DTensor) else tensor.device


def reduce_partial_gradients(parameters: Sequence[torch.Tensor]) -> None:
    """Make gradients that are sums yet to be added up, as sequence parallelism leaves them, into whole ones."""
    from torch.distributed.tensor import DTensor, Replicate

    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and any(one.is_partial() for one in grad.placements):
            added = [Replicate() if one.is_partial() else one for one in grad.placements]
            parameter.grad = grad.redistribute(placements=added)


def norm_of(grads: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """Give the norm of gradients of one layout."""
    from torch.distributed.tensor import DTensor, Partial

    first = grads[0]
    if not isinstance(first, DTensor):
        return nn.utils.get_total_norm(grads, norm_type)
    if norm_type != math.inf:
        norm: DTensor = nn.utils.get_total_norm(grads, norm_type)  # type: ignore[assignment] # of DTensors is one
        return norm.full_tensor()
    # PyTorch has no largest element of an empty part, which a rank has of a parameter with fewer rows than ranks.
    parts = [part for part in map(local_part, grads) if part.numel()]
    largest = nn.utils.get_total_norm(parts, norm_type) if parts else first.to_local().new_zeros(())
    # Backends may lose a NaN in a maximum; that the norm isn't finite must reach every rank.
    largest = largest.nan_to_num(nan=math.inf)
    mesh = first.device_mesh
    return DTensor.from_local(largest, mesh, [Partial("max")] * mesh.ndim).full_tensor()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def grad_of(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.grad is None:
        raise AssertionError("only parameters with a gradient come here")
    return parameter.grad
