"""PyTorch's DDP, of which the strategy knows every copy."""

from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fabric_core.errors import MisuseError
from fabric_plugins._torch import (
    expect_static_reduction,
    leave_reducer,
    reduction_finished,
)

__all__ = ["Frozen", "Known", "Replicated"]


class Known(WeakSet[Any]):
    """The modules that hold on to the process group; copies of one share it, a pickle of one leaves it behind."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Known":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Known, ()


class Replicated(DistributedDataParallel):
    """Adds itself, and its deep copies, to what is known; says so where gradients would never be synchronized."""

    known: Known
    frozen: tuple[nn.Parameter, ...]
    left: bool = False
    reduced: bool = False
    """Whether the first reduction of a static graph was seen to have reached all ranks."""

    def know(self, known: Known) -> None:
        """Be known from now on."""
        self.known = known
        known.add(self)
        self.frozen = _frozen(self.module)

    def leave(self) -> None:
        """Let go of the process group; from now on there is nobody to average with."""
        leave_reducer(self)
        self.left = True

    def averaged(self, complete: bool) -> bool:
        """Say whether the last reduction that was prepared came to its end."""
        if self.static_graph:
            # PyTorch makes the first reduction where a gradient first comes back through an output, whatever pass that
            # is of, and none where it doesn't.
            self.reduced = self.reduced or _alike(self.module, self.process_group)
            return self.reduced and reduction_finished(self.reducer)
        return complete or (self.find_unused_parameters and reduction_finished(self.reducer))

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the module, and prepare for averaging in ``backward``.

        Raises:
            MisuseError: Gradients would not be averaged.
        """
        if self.left:
            if torch.is_grad_enabled():
                raise MisuseError(
                    "there are no other processes any more to average gradients with",
                    where="a forward pass with gradients, after fabric.teardown()",
                    instead="train before the teardown; after it, run the model within torch.no_grad()",
                )
            return self.module(*inputs, **kwargs)
        _check_frozen(self.module, self.frozen)
        return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.reduced = False
        expect_static_reduction(self)
        self.known.add(self)


def _alike(module: nn.Module, group: Any) -> bool:
    """Say whether all ranks have the same gradients; asked once for each model."""
    gradients = [parameter.grad.detach() for parameter in module.parameters() if parameter.grad is not None]
    if not gradients:
        return False
    dense = [one.to_dense() if one.is_sparse else one for one in gradients]
    real = [torch.view_as_real(one) if one.is_complex() else one for one in dense]
    sums = torch.stack([torch.stack([one.float().sum(), one.float().abs().sum()]) for one in real]).sum(0)
    bounds = torch.cat([sums, -sums])  # their maxima over the ranks are equal where the sums are
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    return bool(bounds.isnan().any() or torch.equal(bounds[:2], -bounds[2:]))


class Frozen(nn.Module):
    """A module without trainable parameters, of which DDP has nothing to average."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.frozen = _frozen(module)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the module.

        Raises:
            MisuseError: It has become trainable.
        """
        _check_frozen(self.module, self.frozen)
        return self.module(*inputs, **kwargs)


def _frozen(module: nn.Module) -> tuple[nn.Parameter, ...]:
    return tuple(parameter for parameter in module.parameters() if not parameter.requires_grad)


def _check_frozen(module: nn.Module, frozen: tuple[nn.Parameter, ...]) -> None:
    """Refuse parameters that DDP took for frozen when it was made, and so doesn't average."""
    if not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in frozen)):
        return
    thawed = [id(parameter) for parameter in frozen if parameter.requires_grad]
    raise MisuseError(
        "parameters became trainable after setup, and DDP averages only the gradients of those that were before",
        where="a forward pass with gradients",
        got=", ".join(
            name.removeprefix("module.") for name, parameter in module.named_parameters() if id(parameter) in thawed
        ),
        instead="let them be trainable in fabric.setup, and freeze them after it, with find_unused_parameters=True",
    )
