"""The wrapper ``ema``: an exponential moving average of the weights, to evaluate with."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fabric_core import Fabric, unwrap
from fabric_core.contracts import PluginOptions, Wrapper
from fabric_core.errors import MisuseError


class EMAOptions(PluginOptions):
    """The options of the wrapper ``ema``."""

    decay: float = Field(default=0.999, ge=0, lt=1)
    """How much of the average stays at each step."""


class EMAWrapper(Wrapper):
    """Averages the weights of every model that is set up with an optimizer."""

    Options = EMAOptions
    options: EMAOptions

    def __init__(self, options: EMAOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._averages: WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()
        self._parameters: WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = WeakKeyDictionary()
        self._models: WeakKeyDictionary[Optimizer, list[nn.Module]] = WeakKeyDictionary()
        self._restored: list[Mapping[str, torch.Tensor]] = []

    def after_setup(self, module: nn.Module, replaced: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Start from the weights as they are, or as a checkpoint had them that was loaded before."""
        self._parameters[module] = dict(module.named_parameters(remove_duplicate=False))
        self._averages[module] = {name: one.detach().clone() for name, one in self._parameters[module].items()}
        if self._restored:
            self._load(module, self._restored.pop(0))

    def wrap_optimizer(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Optimizer:
        """Remember whose weights it changes."""
        self._models[optimizer] = list(modules)
        return optimizer

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Move the averages towards the weights that it changed."""
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        for module in self._models.get(optimizer, ()):
            average = self._averages[module]
            for name, one in self._parameters[module].items():
                if id(one) in held:
                    average[name].lerp_(one.detach(), 1 - self.options.decay)

    @contextmanager
    def averaged(self, fabric: Fabric, model: nn.Module) -> Iterator[None]:
        """Let a model have its averages inside the context; call it on every rank.

        Raises:
            MisuseError: The model was not set up.
        """
        module = unwrap(model)
        if module not in self._averages:
            raise MisuseError("the model was not set up", where="EMAWrapper.averaged", got=type(module).__name__,
                              instead="what fabric.setup returned")  # fmt: skip
        # The strategy knows how to read and write the parts of a model that a rank has.
        state = fabric.strategy.module_state(module, False)
        kept = {name: one.detach().clone() for name, one in state.items() if name in self._averages[module]}
        fabric.strategy.load_module_state(module, {**state, **self._averages[module]}, False, True)
        try:
            yield
        finally:
            state = fabric.strategy.module_state(module, False)
            fabric.strategy.load_module_state(module, {**state, **kept}, False, True)

    def state_dict(self) -> dict[str, Any]:
        """Give the averages of all models, in the order of their setup: whole, on the CPU."""
        return {"averages": [{name: _whole(one) for name, one in each.items()} for each in self._averages.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back; of a model that is not set up yet, once it is."""
        self._restored = list(state["averages"])
        for module in self._averages:
            if self._restored:
                self._load(module, self._restored.pop(0))

    def _load(self, module: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor  # slow to import

        average = self._averages[module]
        for name, whole in saved.items():
            own = average[name]
            value = whole.to(own.device, own.dtype)
            average[name] = (
                distribute_tensor(value, own.device_mesh, own.placements) if isinstance(own, DTensor) else value.clone()
            )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather what is divided over ranks."""
    from torch.distributed.tensor import DTensor  # slow to import

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
