"""A process group of one's own, as an object: collectives beside those of a training."""

from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist

__all__ = ["Collective", "SingleDeviceCollective", "TorchCollective"]


class Collective(ABC):
    """Owns a group of processes, from ``create_group`` to ``teardown``."""

    def __init__(self) -> None:
        self._group: Any = None

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process in the group, from 0."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """The number of processes of the group."""

    @classmethod
    @abstractmethod
    def is_available(cls) -> bool:
        """Whether such groups can be had."""

    @classmethod
    @abstractmethod
    def is_initialized(cls) -> bool:
        """Whether the processes know each other."""

    @classmethod
    @abstractmethod
    def init_group(cls, **kwargs: Any) -> None:
        """Let the processes know each other."""

    @classmethod
    @abstractmethod
    def new_group(cls, **kwargs: Any) -> Any:
        """Make a group."""

    @classmethod
    @abstractmethod
    def destroy_group(cls, group: Any) -> None:
        """Destroy a group."""

    @property
    def group(self) -> Any:
        """The group.

        Raises:
            RuntimeError: There is none yet.
        """
        if self._group is None:
            raise RuntimeError(f"{type(self).__name__} has no group: call create_group() first")
        return self._group

    def setup(self, **kwargs: Any) -> Self:
        """Let the processes know each other, where they don't; ``kwargs`` are those of ``init_group``."""
        if not self.is_initialized():
            self.init_group(**kwargs)
        return self

    def create_group(self, **kwargs: Any) -> Self:
        """Make the group; ``kwargs`` are those of ``new_group``.

        Raises:
            RuntimeError: There is one.
        """
        if self._group is not None:
            raise RuntimeError(f"{type(self).__name__} has a group: call teardown() first")
        self._group = self.new_group(**kwargs)
        return self

    def teardown(self) -> Self:
        """Destroy the group.

        Raises:
            RuntimeError: There is none.
        """
        if self._group is None:
            raise RuntimeError(f"{type(self).__name__} has no group to destroy")
        self.destroy_group(self._group)
        self._group = None
        return self


class SingleDeviceCollective(Collective):
    """One process alone: whatever is sent is what is there."""

    @property
    def rank(self) -> int:
        """Always 0."""
        return 0

    @property
    def world_size(self) -> int:
        """Always 1."""
        return 1

    def broadcast(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Give the tensor back, as all of these do."""
        return tensor

    all_reduce = reduce = recv = broadcast

    def gather(self, tensor: torch.Tensor, *_: Any, **__: Any) -> list[torch.Tensor]:
        """Give the tensor, in a list."""
        return [tensor]

    def scatter(
        self, tensor: torch.Tensor, scatter_list: list[torch.Tensor] | None = None, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Give the tensor back."""
        return tensor

    def all_gather(self, tensor_list: list[torch.Tensor], tensor: torch.Tensor, **_: Any) -> list[torch.Tensor]:
        """Give the tensor, in a list."""
        return [tensor]

    def reduce_scatter(self, output: torch.Tensor, input_list: list[torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        """Give the only input."""
        return input_list[0]

    def all_to_all(
        self, output_tensor_list: list[torch.Tensor], input_tensor_list: list[torch.Tensor], *_: Any, **__: Any
    ) -> list[torch.Tensor]:
        """Give the inputs."""
        return input_tensor_list

    def send(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def barrier(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    @classmethod
    def is_available(cls) -> bool:
        """Say yes."""
        return True

    @classmethod
    def is_initialized(cls) -> bool:
        """Say yes."""
        return True

    @classmethod
    def init_group(cls, **_: Any) -> None:
        """Do nothing."""

    @classmethod
    def new_group(cls, **_: Any) -> Any:
        """Give an object that stands for the process."""
        return object()

    @classmethod
    def destroy_group(cls, group: Any) -> None:
        """Do nothing."""


class TorchCollective(Collective):
    """A group of ``torch.distributed``; each method is its function of that name, on the group."""

    def __init__(self) -> None:
        if not dist.is_available():
            raise RuntimeError("torch.distributed is not available in this build of PyTorch")
        super().__init__()
        self._made_default = False

    @property
    def group(self) -> Any:
        """The group; all processes, where none was created."""
        return dist.GroupMember.WORLD if self._group is None else self._group

    @property
    def rank(self) -> int:
        """This process in the group, from 0."""
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        """The number of processes of the group."""
        return dist.get_world_size(self.group)

    def setup(self, main_address: str | None = None, main_port: str | None = None, **kwargs: Any) -> Self:
        """Make PyTorch's default group, where there is none.

        Args:
            main_address: Where rank 0 listens; the variable ``MASTER_ADDR`` where it isn't given.
            main_port: Where rank 0 listens; the variable ``MASTER_PORT`` where it isn't given.
            kwargs: Further arguments of ``torch.distributed.init_process_group``.
        """
        if self.is_initialized():
            return self
        if main_address is not None or main_port is not None:
            kwargs.setdefault("init_method", f"tcp://{main_address or '127.0.0.1'}:{main_port or 12910}")
        self.init_group(**kwargs)
        self._made_default = True
        return self

    def teardown(self) -> Self:
        """Destroy the group, and PyTorch's default group if ``setup`` made it."""
        if self._group is not None:
            super().teardown()
        elif not self._made_default:
            raise RuntimeError("TorchCollective has no group to destroy")
        if self._made_default:
            self._made_default = False
            dist.destroy_process_group()
        return self

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Give every rank the values of one, in place."""
        dist.broadcast(tensor, src, group=self.group)
        return tensor

    def all_reduce(self, tensor: torch.Tensor, op: Any = "sum") -> torch.Tensor:
        """Reduce over the ranks, in place."""
        dist.all_reduce(tensor, op=_operation(op), group=self.group)
        return tensor

    def reduce(self, tensor: torch.Tensor, dst: int, op: Any = "sum") -> torch.Tensor:
        """Reduce over the ranks to one, in place."""
        dist.reduce(tensor, dst, op=_operation(op), group=self.group)
        return tensor

    def all_gather(self, tensor_list: list[torch.Tensor], tensor: torch.Tensor) -> list[torch.Tensor]:
        """Gather from every rank, into the list."""
        dist.all_gather(tensor_list, tensor, group=self.group)
        return tensor_list

    def gather(self, tensor: torch.Tensor, gather_list: list[torch.Tensor], dst: int = 0) -> list[torch.Tensor]:
        """Gather on one rank, into the list; it is empty on the others."""
        dist.gather(tensor, gather_list or None, dst, group=self.group)
        return gather_list

    def scatter(self, tensor: torch.Tensor, scatter_list: list[torch.Tensor], src: int = 0) -> torch.Tensor:
        """Take this rank's element of one rank's list; it is empty on the others."""
        dist.scatter(tensor, scatter_list or None, src, group=self.group)
        return tensor

    def reduce_scatter(self, output: torch.Tensor, input_list: list[torch.Tensor], op: Any = "sum") -> torch.Tensor:
        """Reduce over the ranks, and take this rank's element."""
        dist.reduce_scatter(output, input_list, op=_operation(op), group=self.group)
        return output

    def all_to_all(
        self, output_tensor_list: list[torch.Tensor], input_tensor_list: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Send an element to every rank, and take one from each."""
        dist.all_to_all(output_tensor_list, input_tensor_list, group=self.group)
        return output_tensor_list

    def send(self, tensor: torch.Tensor, dst: int, tag: int = 0) -> None:
        """Send to a rank."""
        dist.send(tensor, dst, tag=tag, group=self.group)

    def recv(self, tensor: torch.Tensor, src: int | None = None, tag: int = 0) -> torch.Tensor:
        """Receive from a rank, in place."""
        dist.recv(tensor, src, tag=tag, group=self.group)
        return tensor

    def all_gather_object(self, object_list: list[Any], obj: Any) -> list[Any]:
        """Gather objects, which are pickled."""
        dist.all_gather_object(object_list, obj, group=self.group)
        return object_list

    def broadcast_object_list(self, object_list: list[Any], src: int, device: torch.device | None = None) -> list[Any]:
        """Give every rank the objects of one, in place."""
        dist.broadcast_object_list(object_list, src, group=self.group, device=device)
        return object_list

    def gather_object(self, obj: Any, object_gather_list: list[Any], dst: int = 0) -> list[Any]:
        """Gather objects on one rank, into the list."""
        dist.gather_object(obj, object_gather_list or None, dst, group=self.group)
        return object_gather_list

    def scatter_object_list(
        self, scatter_object_output_list: list[Any], scatter_object_input_list: list[Any], src: int = 0
    ) -> list[Any]:
        """Take this rank's element of one rank's list, into the first place of the output."""
        dist.scatter_object_list(scatter_object_output_list, scatter_object_input_list, src, group=self.group)
        return scatter_object_output_list

    def barrier(self, device_ids: list[int] | None = None) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self.group, device_ids=device_ids)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Wait until every rank is here; the error names one that isn't. With gloo only."""
        dist.monitored_barrier(group=self.group, timeout=timeout, wait_all_ranks=wait_all_ranks)

    @classmethod
    def is_available(cls) -> bool:
        """Whether PyTorch was built with it."""
        return dist.is_available()

    @classmethod
    def is_initialized(cls) -> bool:
        """Whether there is a default group."""
        return cls.is_available() and dist.is_initialized()

    @classmethod
    def init_group(cls, **kwargs: Any) -> None:
        """Make PyTorch's default group."""
        dist.init_process_group(**kwargs)

    @classmethod
    def new_group(cls, **kwargs: Any) -> Any:
        """Make a group of some of the ranks; ``kwargs`` are those of ``torch.distributed.new_group``."""
        return dist.new_group(**kwargs)

    @classmethod
    def destroy_group(cls, group: Any) -> None:
        """Destroy a group; where this process is no member, there is nothing to destroy."""
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def _operation(op: Any) -> Any:
    """Give PyTorch's operation of a name.

    Raises:
        ValueError: There is no such operation.
    """
    if isinstance(op, str):
        found = getattr(dist.ReduceOp, op.upper(), None)
        if found is None:
            raise ValueError(f"{op!r} is no operation of torch.distributed.ReduceOp")
        return found
    if not isinstance(op, dist.ReduceOp | dist.ReduceOp.RedOpType):
        raise ValueError(f"an operation is a name or a torch.distributed.ReduceOp, and not a {type(op).__name__}")  # noqa: TRY004 - Lightning Fabric's
    return op
