"""The model that the strategies' benchmarks train, and plain PyTorch's ways of training it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

__all__ = ["Block", "Transformer", "hand_ddp", "hand_fsdp"]


class Block(nn.Module):
    """Attention and a two-layer network, each with a norm before it and a residual around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = max(1, width // 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, time, width) to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y: torch.Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class Transformer(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, width: int, depth: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, time) to logits (batch, time, vocabulary)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def hand_ddp(model: nn.Module, *, views: bool = True) -> nn.Module:
    """Wrap by hand; gradients are views into the buckets, as ours are by default."""
    device = next(model.parameters()).device
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=None if device.index is None else [device.index],
        gradient_as_bucket_view=views,
    )


def hand_fsdp(model: Any, device: str = "cpu", half: torch.dtype | None = None) -> nn.Module:
    """Shard by hand, block by block; a model on the meta device gets its memory and values afterwards.

    With a 16-bit type, the blocks compute in it, gradients are reduced in 32 bits, and the output has 32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    reduced = None if half is None else torch.float32
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=reduced))
    root = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=reduced, output_dtype=reduced)
    fully_shard(model, mesh=mesh, mp_policy=root)
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model  # type: ignore[no-any-return]
