"""What strategies with a process group share: joining, leaving and collectives."""

import atexit
import ctypes
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Final, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore, PrefixStore

from fabric_core.contracts import PluginOptions, PrecisionPolicy, Strategy, World, check_reduction, check_source
from fabric_core.errors import LaunchError, MisuseError

__all__ = ["DistributedOptions", "DistributedStrategy", "send_from_zero"]

_OPERATIONS: Final = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


class DistributedOptions(PluginOptions):
    """The options that every strategy with a process group has."""

    timeout: timedelta | None = None
    """How long a collective waits for the other ranks; ``None`` is 30 minutes."""
    process_group_backend: str | None = None
    """The process group's backend; ``None`` is the accelerator's."""
    start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen"
    """How ``fabric.launch`` starts processes; ``popen`` re-runs the command that was typed."""


class DistributedStrategy(Strategy):
    """A process group of all ranks, and the collectives over it."""

    Options = DistributedOptions
    options: DistributedOptions
    _world: World | None = None
    _policy: PrecisionPolicy
    _groups: ClassVar[WeakKeyDictionary[Any, "_Made"]] = WeakKeyDictionary()
    """The default groups that were made here. PyTorch has one in a process: who leaves it last ends it."""

    @property
    def start_method(self) -> str | None:
        """As the option says."""
        return None if self.options.start_method == "popen" else self.options.start_method

    @property
    def world(self) -> World:
        """This process among the others.

        Raises:
            MisuseError: Before ``connect``.
        """
        if self._world is None:
            raise MisuseError(
                "the processes are not connected yet",
                where=type(self).__name__,
                instead="call fabric.launch() first",
            )
        return self._world

    def connect(self, world: World, policy: PrecisionPolicy) -> None:
        """Join the default process group, or make it; one that is made here ends with the process at the latest.

        Raises:
            LaunchError: There is one, and it is not what the options ask for.
        """
        self._world, self._policy = world, policy
        timeout = self.options.timeout or world.timeout
        if dist.is_initialized():
            made = self._groups.get(dist.group.WORLD)
            self._check_group(world, None if made is None else made.timeout)
            if made is not None:
                made.users.add(self)
            return
        store = PrefixStore("default-group", HashStore() if world.open_store is None else world.open_store())
        dist.init_process_group(
            self.options.process_group_backend or world.backend,
            store=store,
            rank=world.global_rank,
            world_size=world.world_size,
            timeout=timeout,
        )
        self._groups[dist.group.WORLD] = _Made(timeout, self)
        atexit.register(_leave, at_exit=True)
        # PyTorch lets a rank go on while others still connect to it; if it left now, they would fail.
        store.set(f"connected/{world.global_rank}", "")
        store.wait([f"connected/{rank}" for rank in range(world.world_size)], timeout)

    def _check_group(self, world: World, timeout: timedelta | None) -> None:
        """Refuse to join a group that is not what was asked for; nobody knows the timeout of one made elsewhere."""
        have: dict[str, Any] = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        want: dict[str, Any] = {"rank": world.global_rank, "world_size": world.world_size}
        if self.options.timeout is not None:
            have["timeout"], want["timeout"] = timeout, self.options.timeout
        backend = self.options.process_group_backend
        if backend is not None:
            pairs = str(dist.BackendConfig(dist.Backend(backend))).split(",")
            if not set(pairs) <= set(dist.get_backend_config().split(",")):
                have["process_group_backend"], want["process_group_backend"] = dist.get_backend_config(), backend
        if have != want:
            raise LaunchError(
                "this process has a process group already, which is not what this strategy asks for",
                where=f"options of the strategy {type(self).__name__}",
                got="; ".join(f"{name}: {have[name]} there, {want[name]} asked for" for name in want),
                instead="fabric.teardown() of the Fabric before it, or the options that the group was made with",
            )

    def teardown(self) -> None:
        """Leave the process group; the last to leave a group that was made here ends it."""
        world, self._world = self._world, None
        made = self._groups.get(dist.group.WORLD) if dist.is_initialized() else None
        if world is None or made is None or self not in made.users:
            return
        made.users.discard(self)
        if not made.users:
            atexit.unregister(_leave)
            _leave(failed=world.world_size > 1 and sys.exc_info()[0] is not None)

    def _start_as_rank_zero(self, module: nn.Module) -> None:
        """Give every rank the parameters and buffers that rank 0 has, as DDP does; meta ones have none yet."""
        tensors = (*module.parameters(), *module.buffers())
        send_from_zero([one.detach() for one in tensors if not one.is_meta], self.world.device)

    def data_shard(self) -> tuple[int, int]:
        """Every rank reads its own part."""
        return self.world.global_rank, self.world.world_size

    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        """Reduce over the ranks; a mean of integers is rounded towards zero, so that the type is kept."""
        self.world  # noqa: B018 - raises before launch
        name = check_reduction(reduce_op)
        # Backends reduce neither booleans nor 16-bit integers.
        dtype = torch.int32 if tensor.dtype in {torch.bool, torch.int16} else tensor.dtype
        result = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(result, _OPERATIONS[name], group=group)
        if name in {"mean", "avg"}:
            count = dist.get_world_size(group)
            whole = not (result.is_floating_point() or result.is_complex())
            result = torch.div(result, count, rounding_mode="trunc" if whole else None)
        return result.to(tensor.dtype)

    def all_gather(self, tensor: torch.Tensor, group: Any | None, sync_grads: bool) -> list[torch.Tensor]:
        """Gather over the ranks; shapes may differ."""
        self.world  # noqa: B018 - raises before launch
        kinds: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(kinds, (tuple(tensor.shape), tensor.dtype), group=group)
        shapes = [shape for shape, _ in kinds]
        if len({(len(shape), dtype) for shape, dtype in kinds}) > 1:
            raise MisuseError(
                "tensors of different types or numbers of dimensions can't be gathered",
                where="all_gather",
                got=", ".join(f"{dtype} of shape {shape} on rank {rank}" for rank, (shape, dtype) in enumerate(kinds)),
                instead="tensors that differ in sizes alone; objects by broadcast",
            )
        if sync_grads:
            from torch.distributed.nn.functional import all_gather

            if len(set(shapes)) > 1:
                raise MisuseError(
                    "gradients can't flow through a gather of tensors whose shapes differ",
                    where="all_gather(sync_grads=True)",
                    got=str(shapes),
                    instead="pad the tensors to one shape",
                )
            return list(all_gather(tensor.contiguous(), group=group))  # type: ignore[no-untyped-call]
        # As bytes: every type can travel, and those of different length are padded.
        own = tensor.detach().contiguous().view(-1).view(torch.uint8)
        sizes = [torch.Size(shape).numel() * tensor.element_size() for shape in shapes]
        padded = own.new_zeros(max(sizes))
        padded[: own.numel()] = own
        parts = [torch.empty_like(padded) for _ in shapes]
        dist.all_gather(parts, padded, group=group)
        return [
            part[:size].view(tensor.dtype).view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True)
        ]

    def broadcast(self, obj: Any, src: int) -> Any:
        """Send any picklable object from one rank to all."""
        check_source(src, self.world.world_size)
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def barrier(self, name: str | None) -> None:
        """Wait until every rank is here."""
        index = self.world.device.index
        dist.barrier(device_ids=None if index is None else [index])


class _Made:
    """A group that was made here: its timeout, and who uses it. Weak, so that one dropped without teardown is none."""

    def __init__(self, timeout: timedelta, user: DistributedStrategy) -> None:
        self.timeout = timeout
        self.users = WeakSet([user])


def _leave(*, failed: bool = False, at_exit: bool = False) -> None:
    """End the process group.

    Whoever lets go of a backend of gloo last waits for what is under way in it. A rank that failed must not: it would
    wait for others, who wait for it. Nor must the interpreter's end, which lets go of what a model still holds.
    """
    _rest()
    if not dist.is_initialized():
        return
    groups = WeakSet(dist.distributed_c10d._world.pg_map)  # noqa: SLF001 - PyTorch names its groups nowhere else
    backends = [
        group._get_backend(device)  # noqa: SLF001
        for group in groups
        for device in group._device_types  # noqa: SLF001
    ]
    if at_exit:
        _keep(backends)
    elif failed:
        atexit.register(_keep, groups)
    dist.destroy_process_group()
    # Letting go of a group holds the interpreter's lock, which its backends' threads may wait for; of a backend not.
    ending = threading.Thread(target=backends.clear, daemon=True)
    ending.start()
    ending.join(1 if failed else None)


def _keep(owners: Iterable[Any]) -> None:
    """Never let go of these, not at the interpreter's end either."""
    for owner in owners:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def _rest() -> None:
    """Wait until the threads of the backends are at rest, a second at most.

    Gloo's let go of an operation's tensors only after it has returned, and need the interpreter for it. One that ends
    just then is aborted (https://github.com/pytorch/pytorch/issues/190489). While this thread sleeps they can have it;
    where the system doesn't say which of them still run, it sleeps longer.
    """
    tasks, own = Path("/proc/self/task"), str(threading.get_native_id())
    if not tasks.exists():
        time.sleep(0.1)
        return
    for _ in range(1000):
        time.sleep(0.001)
        with suppress(OSError):  # a thread ended as it was looked at
            stats = [(task / "stat").read_text() for task in tasks.iterdir() if task.name != own]
            if all(stat.rpartition(")")[2].split()[0] not in {"R", "D"} for stat in stats):
                return


def send_from_zero(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Give every rank the values of rank 0's tensors, in place; they travel through the device."""
    if dist.get_world_size() == 1:
        return
    for tensor in tensors:
        sent = tensor.to(device).contiguous()
        dist.broadcast(sent, 0)
        if sent is not tensor:
            tensor.copy_(sent)
