"""A third party's strategy: every rank computes alone, then gradients are averaged parameter by parameter."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fabric_core import Strategy
from fabric_core.contracts import PluginOptions, PrecisionPolicy, StrategyCapabilities, World


class MeanGradientsOptions(PluginOptions):
    """The options of the strategy ``mean_gradients``."""

    factor: float = 1.0
    """What the mean is multiplied with."""


class MeanGradients(Strategy):
    """Averages gradients after each backward pass."""

    Options = MeanGradientsOptions
    options: MeanGradientsOptions
    capabilities = StrategyCapabilities(distributed=True, min_world_size=2)

    def connect(self, world: World, policy: PrecisionPolicy) -> None:
        """Make the process group."""
        self._world = world
        self._parameters: list[torch.Tensor] = []
        if world.open_store is None:
            raise AssertionError("several processes have a store")
        store = dist.PrefixStore("mean-gradients", world.open_store())
        dist.init_process_group(world.backend, store=store, rank=world.global_rank, world_size=world.world_size)

    def teardown(self) -> None:
        """Leave it."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Let all ranks begin with the same parameters."""
        self._parameters += module.parameters()
        for parameter in module.parameters():
            dist.broadcast(parameter.data, 0)
        return module

    def backward(self, loss: torch.Tensor, arguments: Mapping[str, Any]) -> None:
        """Run backward, then average."""
        super().backward(loss, arguments)
        for parameter in self._parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.mul_(self.options.factor / self._world.world_size)

    def data_shard(self) -> tuple[int, int]:
        """Every rank reads its own part."""
        return self._world.global_rank, self._world.world_size

    def barrier(self, name: str | None) -> None:
        """Wait for all."""
        dist.barrier()
