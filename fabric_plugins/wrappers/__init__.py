"""Wrappers: what else transforms a model."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_plugins.wrappers.activation_checkpointing import ActivationCheckpointingWrapper
    from fabric_plugins.wrappers.channels_last import ChannelsLastWrapper
    from fabric_plugins.wrappers.compile import CompileBlocksWrapper, CompileWrapper

__all__ = ["ActivationCheckpointingWrapper", "ChannelsLastWrapper", "CompileBlocksWrapper", "CompileWrapper"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "ActivationCheckpointingWrapper": "activation_checkpointing",
        "ChannelsLastWrapper": "channels_last",
        "CompileBlocksWrapper": "compile",
        "CompileWrapper": "compile",
    },
)
