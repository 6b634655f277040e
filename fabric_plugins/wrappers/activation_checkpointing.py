"""Activation checkpointing: blocks compute their activations again in ``backward`` instead of keeping them."""

from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import nn

from fabric_core.contracts import Wrapper, WrapperCapabilities
from fabric_plugins._torch import attention_operators, checkpoint_activations
from fabric_plugins.wrappers._blocks import BlockOptions, find_blocks

__all__ = ["ActivationCheckpointingOptions", "ActivationCheckpointingWrapper"]


class ActivationCheckpointingOptions(BlockOptions):
    """The options of the wrapper ``activation_checkpointing``."""

    every: int = Field(default=1, ge=1)
    """Act on every n-th block, beginning with the first."""
    selective: bool = False
    """Keep the results of matrix products and attention, which are dear to compute, and recompute the rest."""


class ActivationCheckpointingWrapper(Wrapper):
    """Trades computing for memory, block by block; the model's names, types and state stay as they are."""

    Options = ActivationCheckpointingOptions
    options: ActivationCheckpointingOptions
    capabilities = WrapperCapabilities(before=frozenset({"compile_blocks"}))

    def wrap_module(self, module: nn.Module) -> nn.Module:
        """Hang the checkpointing on the blocks."""
        arguments = {"context_fn": _selective()} if self.options.selective else {}
        blocks = find_blocks(module, self.options.blocks, "wrappers=['activation_checkpointing']")
        for block in blocks[:: self.options.every]:
            checkpoint_activations(block, **arguments)
        return module


def _selective() -> Any:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    aten = torch.ops.aten
    return partial(
        create_selective_checkpoint_contexts,
        [
            aten.mm.default,
            aten.addmm.default,
            aten.bmm.default,
            aten.baddbmm.default,
            aten.convolution.default,
            *attention_operators(),
        ],
    )
