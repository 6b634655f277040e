"""Collectives over a process group of ``torch.distributed``."""

import atexit
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store

from fabric_core.collectives._ending import end, end_all_at_exit
from fabric_core.collectives.interface import Collectives, check_reduction, check_source
from fabric_core.collectives.world import World
from fabric_core.errors import LaunchError, MisuseError

__all__ = ["ProcessGroup"]

_OPERATIONS: Final = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


class ProcessGroup(Collectives):
    """Collectives over PyTorch's default process group, which it joins or makes, or over a group that is given.

    What is made here is ended by ``close``, and by the end of the process at the latest; the last of several users of
    the default group ends it. A group that somebody else made stays.

    Args:
        world: Who this process is; the collectives are closed when this world ends.
        backend: The backend of a default group that is made here, as PyTorch names it; ``None`` is the accelerator's.
        timeout: How long a collective waits for the other ranks; ``None`` is the world's.
        group: A process group over all ranks or some of them, which is used as it is.
        owned: Whether ``close`` ends the group that is given.

    Raises:
        LaunchError: There is a default group already, and it is not what was asked for.
    """

    _made: ClassVar[WeakKeyDictionary[Any, "_Made"]] = WeakKeyDictionary()
    """The default groups that were made here. PyTorch has one in a process: who leaves it last ends it."""

    def __init__(
        self,
        world: World,
        *,
        backend: str | None = None,
        timeout: timedelta | None = None,
        group: Any | None = None,
        owned: bool = False,
    ) -> None:
        self._world = world
        self._timeout = timeout or world.timeout
        self._group = group
        self._owned = owned
        world.closing.callback(self.close)
        if group is None:
            self._join(backend, timeout)
            self._group = dist.group.WORLD

    @property
    def group(self) -> Any:
        """The process group, for whoever calls ``torch.distributed`` or hands it on.

        Raises:
            MisuseError: After ``close``.
        """
        if self._group is None:
            raise MisuseError(
                "the process group was closed", where="a collective after fabric.teardown()", instead="a new Fabric"
            )
        return self._group

    @property
    def rank(self) -> int:
        """This process in the group, from 0."""
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        """The number of processes of the group."""
        return dist.get_world_size(self.group)

    def _join(self, backend: str | None, timeout: timedelta | None) -> None:
        world = self._world
        if dist.is_initialized():
            made = self._made.get(dist.group.WORLD)
            self._check(backend, timeout, None if made is None else made.timeout)
            if made is not None:
                made.users.add(self)
            return
        store = PrefixStore("default-group", HashStore() if world.open_store is None else world.open_store())
        dist.init_process_group(
            backend or world.backend,
            store=store,
            rank=world.global_rank,
            world_size=world.world_size,
            timeout=self._timeout,
        )
        self._made[dist.group.WORLD] = _Made(self._timeout, self)
        atexit.register(end_all_at_exit)
        wait_until_connected(store, world.world_size, self._timeout)

    def _check(self, backend: str | None, timeout: timedelta | None, its_timeout: timedelta | None) -> None:
        """Refuse to join a group that is not what was asked for; nobody knows the timeout of one made elsewhere."""
        world = self._world
        have: dict[str, Any] = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        want: dict[str, Any] = {"rank": world.global_rank, "world_size": world.world_size}
        if timeout is not None:
            have["timeout"], want["timeout"] = its_timeout, timeout
        if backend is not None:
            pairs = str(dist.BackendConfig(dist.Backend(backend))).split(",")
            if not set(pairs) <= set(dist.get_backend_config().split(",")):
                have["process_group_backend"], want["process_group_backend"] = dist.get_backend_config(), backend
        if have != want:
            raise LaunchError(
                "this process has a process group already, which is not what this strategy asks for",
                where="connecting the strategy",
                got="; ".join(f"{name}: {have[name]} there, {want[name]} asked for" for name in want),
                instead="fabric.teardown() of the Fabric before it, or the options that the group was made with",
            )

    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        """Reduce over the ranks."""
        name, group = check_reduction(reduce_op), self.group if group is None else group
        exact = not (tensor.is_floating_point() or tensor.is_complex())
        if exact and name == "mean":
            dtype = torch.int64
        else:
            # Backends reduce neither booleans nor 16-bit integers.
            dtype = torch.int32 if tensor.dtype in {torch.bool, torch.int16} else tensor.dtype
        result = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(result, _OPERATIONS[name], group=group)
        if name != "mean":
            return result.to(tensor.dtype)
        mean = result / dist.get_world_size(group)
        return mean if exact else mean.to(tensor.dtype)

    def all_gather(self, tensor: torch.Tensor, group: Any | None, sync_grads: bool) -> list[torch.Tensor]:
        """Gather over the ranks; shapes may differ."""
        group = self.group if group is None else group
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
        check_source(src, self.world_size)
        box = [obj]
        dist.broadcast_object_list(box, group=self.group, group_src=src)
        return box[0]

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        """Send tensors from one rank to all; they travel through this process's device."""
        check_source(src, self.world_size)
        if self.world_size == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().to(self._world.device).contiguous()
            dist.broadcast(sent, group=self.group, group_src=src)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(sent)

    def barrier(self, name: str | None) -> None:
        """Wait until every rank is here."""
        index = self._world.device.index
        dist.barrier(group=self.group, device_ids=None if index is None else [index])

    def fork(self) -> "ProcessGroup":
        """Make a second group of the same ranks, with the same backend and timeout."""
        group = dist.new_group(
            dist.get_process_group_ranks(self.group),
            timeout=self._timeout,
            # Of a part of the ranks, only those that belong to it are here to make it.
            use_local_synchronization=self.group is not dist.group.WORLD,
        )
        return type(self)(self._world, timeout=self._timeout, group=group, owned=True)

    def close(self) -> None:
        """Leave the group; what was made here ends with its last user."""
        box, self._group = [self._group], None
        if box == [None] or not dist.is_initialized():
            return
        failed = self._world.world_size > 1 and sys.exc_info()[0] is not None
        if self._owned:
            end(box, failed=failed)
            return
        made = self._made.get(box[0])
        if made is None or self not in made.users:
            return
        made.users.discard(self)
        if not made.users:
            atexit.unregister(end_all_at_exit)
            end(box, failed=failed)


class _Made:
    """A group that was made here: its timeout, and who uses it. Weak, so that one dropped without closing is none."""

    def __init__(self, timeout: timedelta, user: ProcessGroup) -> None:
        self.timeout = timeout
        self.users = WeakSet([user])


def wait_until_connected(store: Store, world_size: int, timeout: timedelta) -> None:
    """Wait until every rank has connected: PyTorch lets a rank go on while others still connect to it.

    If it left now, they would fail. Each rank does the same few operations, however many there are.
    """
    if store.add("connected", 1) == world_size:
        store.set("all-connected", "")
    store.wait(["all-connected"], timeout)
