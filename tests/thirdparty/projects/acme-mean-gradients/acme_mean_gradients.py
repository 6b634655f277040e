"""A third party's strategy: every rank computes alone, then gradients are averaged parameter by parameter."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fabric_core import Strategy
from fabric_core.contracts import (
    Collectives,
    PluginOptions,
    PrecisionPolicy,
    ProcessGroup,
    StrategyCapabilities,
    World,
)


class MeanGradientsOptions(PluginOptions):
    """The options of the strategy ``mean_gradients``."""

    factor: float = 1.0
    """What the mean is multiplied with."""


class MeanGradients(Strategy):
    """Averages gradients after each backward pass."""

    Options = MeanGradientsOptions
    options: MeanGradientsOptions

    capabilities = StrategyCapabilities(distributed=True, requires_strategy_backward=True)

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Make the process group, or join it."""
        self._group, self._modules = ProcessGroup(world), list[nn.Module]()
        return self._group

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Let all ranks begin with rank 0's values."""
        self._group.broadcast_tensors([*module.parameters(), *module.buffers()], 0)
        self._modules.append(module)
        return module

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Run the backward pass, then average; a rank that has no gradient counts as zero."""
        super().backward(loss, module, arguments)
        for parameter in (one for each in self._modules for one in each.parameters() if one.requires_grad):
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self._group.all_reduce(grad, None, "mean") * self.options.factor

    def teardown(self) -> None:
        """Forget the models."""
        self._modules = []
