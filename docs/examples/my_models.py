"""A model for `fabric-core estimate my_models:make`, which needs a function that returns a model and a batch."""

import torch
from torch import nn


def make(batch: int = 32) -> tuple[nn.Module, torch.Tensor]:
    """Make eight layers, and a batch of shape (batch, 1024)."""
    layers = [nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(8)]
    return nn.Sequential(*layers), torch.randn(batch, 1024)
