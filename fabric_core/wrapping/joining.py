"""Training where ranks have different numbers of batches: those that are through shadow the others' communication."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.optim import Optimizer

from fabric_core._torch import tree_map_only
from fabric_core.contracts import Precision, Strategy
from fabric_core.errors import SetupError

__all__ = ["joined"]

_ELSE: Final = (
    "a loop in which a rank without a batch repeats its last one with a loss of zero: docs/how-to/uneven-data.md"
)


@contextmanager
def joined(
    inners: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    strategy: Strategy,
    precision: Precision,
    *,
    divide_by_initial_world_size: bool,
) -> Iterator[None]:
    """Let a rank that leaves the context shadow what the others still do; at the end all go on from the same state.

    PyTorch's ``Join`` gives all ranks the parameters and buffers of the rank that trained longest. Here they are given
    that rank's optimizer states too: they would train apart from then on.

    Args:
        inners: What the strategy made of the models that are trained inside.
        optimizers: Their optimizers, in the same order on every rank.
        strategy: The bound strategy.
        precision: The bound precision.
        divide_by_initial_world_size: Divide summed gradients by the number of ranks; else by those still training.

    Raises:
        SetupError: Nothing can shadow the communication of what the strategy makes of a model, or of the precision.
    """
    joinables: list[Joinable] = []
    for inner in inners:
        if isinstance(inner, Joinable):
            joinables.append(inner)
        elif any(one.requires_grad for one in inner.parameters()):
            raise SetupError(
                f"under {type(strategy).__name__} every rank needs the same number of batches",
                where="fabric.join",
                got=f"a {type(inner).__name__}, whose communication no other rank can shadow",
                instead=f"a strategy whose models are PyTorch's Joinable, as those of its DDP are; or {_ELSE}",
            )
    if precision.policy.loss_scaling:
        raise SetupError(
            "with loss scaling all ranks agree on each step, and those that are through make none",
            where="fabric.join",
            got=type(precision).__name__,
            instead=f"a precision that doesn't scale the loss; or {_ELSE}",
        )
    if not joinables:
        yield
        return

    device = joinables[0].join_device

    def share(last: bool) -> None:
        _share_state(optimizers, strategy, torch.tensor([int(last)], device=device))

    everything = [*joinables, _State(joinables[0], share)]
    join = Join(everything, divide_by_initial_world_size=divide_by_initial_world_size)
    try:
        yield
        with warnings.catch_warnings():  # it changes the filters
            join.__exit__(None, None, None)
    finally:
        Join(everything, enable=False)  # it leaves its settings on the modules


class _State(Joinable):
    """What of a training is in no model: it communicates at the end alone."""

    def __init__(self, first: Joinable, share: Callable[[bool], None]) -> None:
        super().__init__()
        self._first = first
        self._share = share

    @property
    def join_device(self) -> torch.device:
        """The models' device."""
        return self._first.join_device

    @property
    def join_process_group(self) -> Any:
        """The models' process group."""
        return self._first.join_process_group

    def join_hook(self, **_kwargs: Any) -> JoinHook:
        """Give what is called at the end."""
        return _Hook(self._share)


class _Hook(JoinHook):
    def __init__(self, share: Callable[[bool], None]) -> None:
        self._share = share

    def post_hook(self, is_last_joiner: bool) -> None:
        """Share the state."""
        self._share(is_last_joiner)


def _share_state(optimizers: Sequence[Optimizer], strategy: Strategy, last: torch.Tensor) -> None:
    """Give all ranks the state of the highest of those that trained longest, which PyTorch takes the models from."""
    collectives = strategy.collectives
    lasts = [rank for rank, one in enumerate(collectives.all_gather(last, None, False)) if one.item()]
    if len(lasts) == collectives.world_size:
        return
    own = [strategy.optimizer_state(one, full=False) for one in optimizers] if collectives.rank == lasts[-1] else []
    states = collectives.broadcast(tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), own), lasts[-1])
    if collectives.rank != lasts[-1]:
        for optimizer, state in zip(optimizers, states, strict=True):
            strategy.load_optimizer_state(optimizer, state, full=False)
