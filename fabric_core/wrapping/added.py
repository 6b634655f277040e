"""Refuses to train what was put into a model after setup, where a strategy knows only what was there."""

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.optim import Optimizer

from fabric_core.errors import MisuseError
from fabric_core.wrapping.notes import held_by, shown

__all__ = ["Added"]


class Added:
    """Knows the parameters that models had at setup; an optimizer is looked at again when it has another number."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, dict[int, ref[Any]]] = WeakKeyDictionary()
        self._seen: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()

    def know(self, module: nn.Module) -> None:
        """Know what a model that was set up has now."""
        self._known[module] = {id(one): ref(one) for one in module.parameters()}
        self._seen.clear()

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that trains what was put into a model later.

        Raises:
            MisuseError: It does.
        """
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._seen.get(optimizer) == count:
            return
        held = held_by(optimizer)
        at_setup = {key: one for known in self._known.values() for key, one in known.items()}
        for module in list(self._known):
            later = [
                name
                for name, one in module.named_parameters()
                if id(one) in held and one.requires_grad and (id(one) not in at_setup or at_setup[id(one)]() is not one)
            ]
            if later:
                raise MisuseError(
                    "parameters were put into the model after setup, so the strategy knows nothing of them, and each"
                    " rank would train its own",
                    where=f"{type(optimizer).__name__}.step, on {type(module).__name__}",
                    got=shown(later),
                    instead="change the model before fabric.setup",
                )
        self._seen[optimizer] = count
