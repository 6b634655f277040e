"""What DeepSpeed takes from the process, and leaves in it."""

import os
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from torch import nn

from fabric_core.contracts import World
from fabric_core.errors import UnavailableError

_LONGEST_COMPILATION: Final = 900.0
"""Seconds after which who compiles DeepSpeed's communication is taken for killed: on busy cores it takes minutes."""


def imported(device_type: str) -> Any:
    """Import DeepSpeed, which chooses its hardware by itself, and correct its choice."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if device_type == "cpu" and get_accelerator().device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
    return deepspeed


@contextmanager
def local_rank(world: World) -> Iterator[None]:
    """Let DeepSpeed read its local rank, in forward passes too, from the variable that not all launchers set."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def wait_for_compilation() -> None:
    """Wait while another process compiles DeepSpeed's communication, but not for one that was killed.

    PyTorch itself waits until the lock is gone, without an end and without a word, and a killed process leaves it.

    Raises:
        UnavailableError: The lock is older than any compilation.
    """
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    folders = [Path(given)] if given else Path(get_default_build_root()).glob(f"{version}*")
    for lock in [folder / "deepspeed_shm_comm" / "lock" for folder in folders]:
        with suppress(FileNotFoundError):  # as long as it is there
            while (age := time.time() - lock.stat().st_mtime) < _LONGEST_COMPILATION:
                time.sleep(0.1)
            raise UnavailableError(
                "DeepSpeed's communication can't be compiled: an earlier compilation was killed, and left its lock",
                where=str(lock),
                got=f"a lock from {age:.0f} seconds ago",
                instead=f"rm {lock}, unless something compiles it right now",
            )


def forget_groups() -> None:
    """Let DeepSpeed forget the groups that it keeps for the process, once they are gone: a new Fabric makes new ones.

    It does so itself only where it is asked to end PyTorch's default group, which others may use.
    """
    from deepspeed.utils import groups

    if groups._WORLD_GROUP is None:  # noqa: SLF001
        return
    try:
        dist.get_global_rank(groups._WORLD_GROUP, 0)  # noqa: SLF001
    except ValueError:  # PyTorch doesn't know it any more
        groups._release_process_group_references(group=None)  # noqa: SLF001


def forget_stage_3(modules: Collection[nn.Module]) -> None:
    """Undo what stage 3 sets for the whole process: it holds modules for good, and replaces a function of PyTorch."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    held = parameter_offload.FWD_MODULE_STACK
    held[:] = [one for one in held if one not in modules]
    if nn.functional.linear is zero3_linear_wrap:
        nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk


@contextmanager
def process_unchanged() -> Iterator[None]:
    """Undo what importing and compiling DeepSpeed sets for the whole process."""
    variables, path = dict(os.environ), sys.path[:]
    try:
        yield
    finally:
        for name in set(os.environ) - set(variables):
            del os.environ[name]
        os.environ.update(variables)
        sys.path[:] = path
