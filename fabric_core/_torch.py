"""Every private or undocumented part of PyTorch that the core uses, with the reason, and what would replace it."""

from typing import Any

import torch.distributed as dist
from torch import nn

__all__ = ["backends_of", "loading_hooks", "process_groups"]


def process_groups() -> list[Any]:
    """List the process groups of this process; PyTorch names them nowhere else. A public list would replace it."""
    return list(dist.distributed_c10d._world.pg_map)  # noqa: SLF001


def backends_of(group: Any) -> list[Any]:
    """List the backends of a process group, which own its threads; a public accessor would replace it."""
    return [group._get_backend(device) for device in group._device_types]  # noqa: SLF001


def loading_hooks(module: nn.Module) -> list[Any]:
    """List what a module loads its state with: methods and hooks; a public list of hooks would replace it."""
    kind = type(module)
    hooks = module._load_state_dict_pre_hooks.values()  # noqa: SLF001
    return [
        kind.load_state_dict,
        kind._load_from_state_dict,  # noqa: SLF001
        *(getattr(hook, "hook", hook) for hook in hooks),
    ]
