"""Plugins that wait or die where the kit must not; each is asked for by its place, in processes of the kit's."""

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fabric_core.collectives import ProcessGroup
from fabric_core.conformance.references import Averaging, Full, Tagging
from fabric_core.contracts import PrecisionCapabilities, StrategyCapabilities


class Hanging(Tagging):
    """Never comes back from wrapping a module."""

    def wrap_module(self, module: nn.Module) -> nn.Module:
        """Wait."""
        time.sleep(1000)
        return module


class Exiting(Tagging):
    """Ends its process when it wraps a module."""

    def wrap_module(self, module: nn.Module) -> nn.Module:
        """End the process."""
        os._exit(5)


class Endless(Full):
    """Never comes back from being made."""

    def __init__(self, *arguments: Any, **given: Any) -> None:
        super().__init__(*arguments, **given)
        time.sleep(1000)


class DyingLater(Averaging):
    """Ends its process when nobody asks it for anything."""

    def teardown(self) -> None:
        """Let a thread end the process."""
        super().teardown()
        threading.Timer(0.05, lambda: os._exit(9)).start()


class HangingGroup(ProcessGroup):
    """Hangs over tensors with rows."""

    def all_gather(self, tensor: torch.Tensor, group: Any, sync_grads: bool) -> list[torch.Tensor]:
        """Wait, or gather."""
        if tensor.numel():
            time.sleep(1000)
        return super().all_gather(tensor, group, sync_grads)


class WaitingForRows(Averaging):
    """Has collectives that hang over tensors with rows."""

    group_class = HangingGroup


class ForCuda(Averaging):
    """Runs on CUDA alone."""

    capabilities = StrategyCapabilities(distributed=True, no_backward_sync=True, device_types=frozenset({"cuda"}))


class FullForCuda(Full):
    """Runs on CUDA alone."""

    capabilities = PrecisionCapabilities(device_types=frozenset({"cuda"}))


class Pairwise(Averaging):
    """Needs two processes."""

    capabilities = StrategyCapabilities(distributed=True, no_backward_sync=True, min_world_size=2)


class SummingSingles(Averaging):
    """Sums gradients, and trains parameters of 32 bits alone."""

    capabilities = Averaging.capabilities.model_copy(update={"param_dtypes": frozenset({"float32"})})

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum."""
        super().average(parameters)
        for one in parameters:
            if one.grad is not None:
                one.grad *= self.world.world_size
