"""Every private or undocumented part of PyTorch that the core uses, with the reason, and what would replace it."""

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn

__all__ = [
    "after_backward",
    "backends_of",
    "backward_state",
    "loading_hooks",
    "process_groups",
    "set_backward_state",
]

_STATE: Final = "fabric_core.backward"


def process_groups() -> list[Any]:
    """List the process groups of this process; PyTorch names them nowhere else. A public list would replace it."""
    return list(dist.distributed_c10d._world.pg_map)  # noqa: SLF001


def backends_of(group: Any) -> list[Any]:
    """List the backends of a process group, which own its threads; a public accessor would replace it."""
    return [group._get_backend(device) for device in group._device_types]  # noqa: SLF001


def after_backward(function: Callable[[], None]) -> None:
    """Call a function once the backward pass that runs now, and all that was to follow it, is over.

    It is called in a hook of the pass. A strategy's own callbacks, such as DDP's, may be queued after it and before the
    end; so this one queues itself once more, behind them. A public ``queue_callback`` would replace it.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback  # noqa: SLF001
    queue(lambda: queue(function))


def backward_state() -> Any:
    """Give what this thread, or the one whose backward pass an engine's thread computes, has set; else ``None``.

    Python's own thread-local values and contexts do not reach the engine's threads.
    """
    tls = torch._C  # noqa: SLF001
    return tls._get_obj_in_tls(_STATE) if tls._is_key_in_tls(_STATE) else None  # noqa: SLF001


def set_backward_state(state: Any) -> None:
    """Set a value for this thread, and for the engine's threads while they compute its backward passes."""
    torch._C._stash_obj_in_tls(_STATE, state)  # noqa: SLF001


def loading_hooks(module: nn.Module) -> list[Any]:
    """List what a module loads its state with: methods and hooks; a public list of hooks would replace it."""
    kind = type(module)
    hooks = module._load_state_dict_pre_hooks.values()  # noqa: SLF001
    return [
        kind.load_state_dict,
        kind._load_from_state_dict,  # noqa: SLF001
        *(getattr(hook, "hook", hook) for hook in hooks),
    ]
