"""The memory format in which convolutions are fastest on many devices."""

import torch
from torch import nn

from fabric_core.contracts import Wrapper

__all__ = ["ChannelsLastWrapper"]


class ChannelsLastWrapper(Wrapper):
    """Lays out the weights of two-dimensional convolutions with the channels last; inputs follow by themselves."""

    def wrap_module(self, module: nn.Module) -> nn.Module:
        """Lay out the parameters and buffers of four dimensions, in place."""
        placed: nn.Module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # PyTorch's stub
        return placed
