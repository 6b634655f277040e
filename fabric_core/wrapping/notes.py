"""What is noted of a module's parameters, one by one, without keeping any of them alive."""

from collections.abc import Iterable, Iterator, Sequence
from weakref import ref

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["Notes", "held_by", "shown", "trainable"]

_SHOWN = 4
"""How many names a message shows."""


class Notes:
    """Parameters by their index, each with a name, and the set of those that something is noted of.

    Args:
        parameters: Their names and themselves.
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        pairs = list(parameters)
        self.names = [name for name, _ in pairs]
        self._references = [ref(parameter) for _, parameter in pairs]
        self.noted: set[int] = set()

    def with_gradients(self, held: set[int]) -> list[int]:
        """Give those of what is noted that an optimizer holds and that have a gradient; forget those that have none."""
        found = []
        for index in sorted(self.noted):  # the set itself changes
            parameter = self._references[index]()
            if parameter is None or parameter.grad is None:
                self.noted.discard(index)
            elif id(parameter) in held:
                found.append(index)
        return found

    def living(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Give the parameters that are still there, each with its index."""
        for index, reference in enumerate(self._references):
            parameter = reference()
            if parameter is not None:
                yield index, parameter

    def forget(self, held: set[int]) -> None:
        """Forget what is noted of the parameters that an optimizer holds."""
        references = self._references
        kept = [index for index in self.noted if id(references[index]()) not in held]
        self.noted.clear()
        self.noted.update(kept)

    def shown(self, indices: Iterable[int]) -> str:
        """Name parameters, for a message."""
        return shown([self.names[index] for index in indices])


def shown(names: Sequence[str]) -> str:
    """Show the first of some names, for a message."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def held_by(optimizer: Optimizer) -> set[int]:
    """Give the identities of an optimizer's parameters."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Give the parameters that can have gradients, frozen ones too, which may be trained later."""
    return [
        (name, one)
        for name, one in module.named_parameters()
        if one.is_leaf and (one.is_floating_point() or one.is_complex()) and not nn.parameter.is_lazy(one)
    ]
