"""What a rank holds in memory while it trains."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["MemoryEstimate"]


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What one rank holds through a training step, in bytes; what the model computes comes on top.

    Args:
        parameters: Parameters and buffers.
        gradients: All gradients, as they are after a backward pass.
        optimizer: The optimizer's state, as it is after a step.
        in_flight: The most that buckets, gathered units and the like take at one time, beside all of these.
        in_flight_last: Likewise when ``backward`` ends, and of what ``forward`` computed the output alone is left.
        gradients_stay: The gradients' memory is there during ``forward`` too, however they are cleared.
    """

    parameters: int
    gradients: int
    optimizer: int
    in_flight: int = 0
    in_flight_last: int = 0
    gradients_stay: bool = False

    @classmethod
    def of(cls, module: nn.Module, optimizer: Optimizer, part: Callable[[torch.Tensor], int] | None = None) -> Self:
        """Count what a model and its optimizer hold after a step.

        Args:
            module: The model, whose parameters have gradients.
            optimizer: Its optimizer, which has stepped.
            part: Gives how many bytes of a parameter a rank holds, and so of its gradient and of the optimizer's state
                of the same shape; ``None`` is all.
        """
        size = part or _size
        parameters = list(module.parameters())
        return cls(
            parameters=sum(map(size, parameters)) + sum(map(_size, module.buffers())),
            gradients=sum(map(size, _gradients(parameters))),
            optimizer=sum(
                size(value) if value.shape == parameter.shape else _size(value)
                for parameter, state in optimizer.state.items()
                for value in state.values()
                if isinstance(value, torch.Tensor)
            ),
        )


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [one.grad for one in parameters if one.grad is not None]
