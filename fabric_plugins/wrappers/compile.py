"""Compilation by ``torch.compile``: of the whole model, or of each repeated block."""

from typing import Any, cast

import torch
from torch import nn

from fabric_core.contracts import PluginOptions, Wrapper, WrapperCapabilities
from fabric_plugins.wrappers._blocks import BlockOptions, find_blocks

__all__ = ["CompileBlocksOptions", "CompileBlocksWrapper", "CompileOptions", "CompileWrapper"]


class CompileOptions(PluginOptions):
    """``torch.compile``'s arguments under their own names."""

    backend: Any = "inductor"
    """The compiler's name, or a callable."""
    mode: str | None = None
    """``"default"``, ``"reduce-overhead"``, ``"max-autotune"``, ..."""
    fullgraph: bool = False
    """What can't be compiled in one piece is an error."""
    dynamic: bool | None = None
    """Compile for shapes that change; ``None`` finds out."""
    options: dict[str, Any] | None = None
    """The compiler's own options."""


class CompileBlocksOptions(BlockOptions, CompileOptions):
    """The options of the wrapper ``compile_blocks``."""


class CompileWrapper(Wrapper):
    """Compiles what the strategy made of the model."""

    Options = CompileOptions
    options: CompileOptions
    capabilities = WrapperCapabilities(stage="after_strategy")

    def wrap_module(self, module: nn.Module) -> nn.Module:
        """Compile at the first call."""
        return cast("nn.Module", torch.compile(module, **dict(self.options)))


class CompileBlocksWrapper(Wrapper):
    """Compiles each repeated block by itself, in place: faster to compile, and free to be sharded block by block."""

    Options = CompileBlocksOptions
    options: CompileBlocksOptions
    capabilities = WrapperCapabilities(after=frozenset({"activation_checkpointing"}))

    def wrap_module(self, module: nn.Module) -> nn.Module:
        """Compile each block at its first call."""
        arguments = dict(self.options)
        names = arguments.pop("blocks")
        for block in find_blocks(module, names, "wrappers=['compile_blocks']"):
            block.compile(**arguments)
        return module
