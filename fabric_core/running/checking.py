"""The checked mode: before they communicate, ranks compare what they are about to do.

[Note: meeting] The n-th call of every rank meets the n-th call of the others in the store. The first to come leaves
what it is about to do; who comes with something else says so. Each rank does a few operations, however many ranks there
are. A rank that tears down is a call too, which nobody waits in; so whoever waits for it learns at once.
"""

import sys
import time
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import nn
from torch.distributed import Store

from fabric_core.binding import around
from fabric_core.collectives import World
from fabric_core.errors import LaunchError
from fabric_core.markers import hookimpl

__all__ = ["CheckedCalls", "frames_line"]

_OURS: Final = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
_LIBRARIES: Final = ("pluggy", "contextlib.py", "functools.py")
_POLL: Final = 0.1
"""How many seconds lie between two looks into the store, at most."""
_PATIENCE: Final = 3.0
"""After how many seconds a line says whom a rank waits for."""


class CheckedCalls:
    """An extension that compares, before each collective, backward pass and step, what the ranks are about to do.

    ``Fabric(check=True)`` adds it. Calls differ where their names, what they are given (shapes, types, the operation),
    or the lines of the user's code differ.
    """

    sharded = False
    """Whether forward passes communicate without gradients too."""

    def __init__(self) -> None:
        self._world: World | None = None
        self._calls = 0

    @hookimpl
    def launched(self, world: World) -> None:
        """Begin with the first call after the launch."""
        self._world = world if world.world_size > 1 else None
        self._calls = 0

    def _meet(self, what: str) -> None:
        """Wait until every rank is about to do the same.

        Raises:
            LaunchError: One is about to do something else; it names what each does, and where.
        """
        world = self._world
        if world is None or world.open_store is None:
            return
        store, key = world.open_store(), f"check/{self._calls}"
        self._calls += 1
        self._arrive(store, key, world, f"{what} at {user_line()}")
        begin, said, pause = time.monotonic(), False, 0.0005
        while not store.check([f"{key}/all"]) and not store.check([f"{key}/differs"]):
            waited = time.monotonic() - begin
            if waited > world.timeout.total_seconds():
                break
            if waited > _PATIENCE and not said:
                said = True
                self._say(store, key, world, waited)
            time.sleep(pause)
            pause = min(2 * pause, _POLL)
        if store.check([f"{key}/differs"]) or not store.check([f"{key}/all"]):
            there = self._there(store, key, world)
            raise LaunchError(
                "the ranks are about to do different things",
                where=there.get(world.global_rank),
                got="; ".join(f"rank {rank}: {text}" for rank, text in sorted(there.items())),
                instead="the same calls of Fabric in the same order on every rank",
                calls=there,
            )

    def _arrive(self, store: Store, key: str, world: World, text: str) -> None:
        store.set(f"{key}/{world.global_rank}", text)
        first = store.compare_set(f"{key}/first", "", text).decode()
        if first != text:
            store.set(f"{key}/differs", text)
        if store.add(f"{key}/count", 1) == world.world_size:
            store.set(f"{key}/all", "")
            # Whoever is here has read all that it will ever read of the call before.
            before = f"check/{self._calls - 2}"
            for name in ("first", "count", "all", *map(str, range(world.world_size))):
                store.delete_key(f"{before}/{name}")

    @staticmethod
    def _there(store: Store, key: str, world: World) -> dict[int, str]:
        ranks = range(world.world_size)
        return {
            rank: store.get(f"{key}/{rank}").decode()
            if store.check([f"{key}/{rank}"])
            else "not there: in code of its own, or ended"
            for rank in ranks
        }

    def _say(self, store: Store, key: str, world: World, waited: float) -> None:
        lines = "; ".join(f"rank {rank}: {text}" for rank, text in self._there(store, key, world).items())
        print(f"[fabric, rank {world.global_rank}] has waited {waited:.0f} s: {lines}", file=sys.stderr)  # noqa: T201

    @around.collectives
    def all_reduce(self, tensor: torch.Tensor, reduce_op: str) -> Generator[None, Any, Any]:
        """Compare shape, type and operation."""
        self._meet(f"all_reduce({_shown(tensor)}, {reduce_op!r})")
        return (yield)

    @around.collectives
    def all_gather(self, tensor: torch.Tensor) -> Generator[None, Any, Any]:
        """Compare the type; shapes may differ."""
        self._meet(f"all_gather({str(tensor.dtype).removeprefix('torch.')})")
        return (yield)

    @around.collectives
    def broadcast(self, src: int) -> Generator[None, Any, Any]:
        """Compare the source."""
        self._meet(f"broadcast(src={src})")
        return (yield)

    @around.collectives
    def broadcast_tensors(self, tensors: Any, src: int) -> Generator[None, Any, Any]:
        """Compare the source and the number of tensors."""
        self._meet(f"broadcast_tensors({len(tensors)}, src={src})")
        return (yield)

    @around.collectives
    def barrier(self, name: str | None) -> Generator[None, Any, Any]:
        """Compare the name."""
        self._meet(f"barrier({name or ''})")
        return (yield)

    @around.strategy
    def setup_module(self) -> Generator[None, Any, Any]:
        """Compare, before each forward pass that may communicate, that it is one."""
        module: nn.Module = yield
        module.register_forward_pre_hook(self._forward, prepend=True)  # before FSDP2 gathers
        return module

    def _forward(self, module: nn.Module, _inputs: Any) -> None:
        # Under sharding every pass gathers parameters; without it, only those that prepare a backward pass communicate.
        if self.sharded or torch.is_grad_enabled():
            self._meet(f"forward of {type(module).__name__}")

    @around.strategy
    def backward(self) -> Generator[None, Any, Any]:
        """Compare that it is one."""
        self._meet("backward")
        return (yield)

    @around.strategy
    def optimizer_step(self, optimizer: Any) -> Generator[None, Any, Any]:
        """Compare the optimizer's class."""
        self._meet(f"{type(optimizer).__name__}.step")
        return (yield)

    @around.strategy
    def teardown(self) -> Generator[None, Any, Any]:
        """Tell whoever waits that this rank comes to no call any more; wait for nobody."""
        world, self._world = self._world, None
        if world is not None and world.open_store is not None:
            self._calls += 1
            self._arrive(world.open_store(), f"check/{self._calls - 1}", world, "the end of its Fabric")
        return (yield)


def _shown(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def user_line() -> str:
    """Give the file and line of the user's code that led here."""
    return frames_line(sys._getframe(1))  # noqa: SLF001 - documented; `inspect` reads every frame's file


def frames_line(frame: FrameType | None) -> str:
    """Give the file and line of the innermost frame that is neither of the project nor of PyTorch or pluggy."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_OURS) and not any(name in file for name in _LIBRARIES):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown line"
