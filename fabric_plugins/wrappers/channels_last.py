"""The memory format in which convolutions are fastest on many devices."""

from typing import Final

import torch
from torch import nn

from fabric_core.contracts import Wrapper

__all__ = ["ChannelsLastWrapper"]


class ChannelsLastWrapper(Wrapper):
    """Lays out the weights of two-dimensional convolutions with the channels last; inputs follow by themselves."""

    def wrap_module(self, module: nn.Module) -> nn.Module:
        """Lay out the parameters and buffers of four dimensions, in place."""
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dim() == _DIMENSIONS:  # those of three-dimensional convolutions have five, and no such layout
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        return module


_DIMENSIONS: Final = 4
