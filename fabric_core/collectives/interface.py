"""What collectives are, and those of a single process."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import torch

from fabric_core.errors import RequestError
from fabric_core.markers import behaviour

__all__ = ["Collectives", "SingleProcess", "check_reduction", "check_source"]

_REDUCTIONS: Final = ("sum", "mean", "avg", "max", "min", "product")
"""The operations of ``Collectives.all_reduce``; ``avg`` is ``mean``."""


class Collectives(ABC):
    """How ranks exchange data; what ``Strategy.connect`` returns.

    Every rank calls every method in the same order. The strategy's own communication (gradients) travels on the
    collectives that it made; the façade, the precision and checkpoints use a ``fork`` of them, so that a user's
    collective never meets a gradient. An extension wraps a method with ``@around.collectives``.
    """

    kind: ClassVar[str] = "collectives"
    """The word after ``@around.``."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process among the others, from 0."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """The number of processes."""

    @behaviour
    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        """Reduce a tensor over the ranks.

        Args:
            tensor: The tensor of this rank, of the same shape and type on every rank; left as it is.
            group: A process group over some of the ranks; ``None`` is all of them.
            reduce_op: ``"sum"``, ``"mean"``, ``"max"``, ``"min"``, ``"product"``.

        Returns:
            A new tensor of the same shape, through which no gradient flows; of the same type, but for the mean of
            integers or booleans, which is of PyTorch's default floating-point type.

        Raises:
            RequestError: There is no such operation.
        """

    @behaviour
    @abstractmethod
    def all_gather(self, tensor: torch.Tensor, group: Any | None, sync_grads: bool) -> list[torch.Tensor]:
        """Gather the tensors of all ranks.

        Args:
            tensor: The tensor of this rank; shapes may differ between ranks, types and numbers of dimensions may not.
            group: A process group over some of the ranks; ``None`` is all of them.
            sync_grads: Let gradients flow back to the rank that a tensor came from; shapes must be equal then.

        Returns:
            New tensors, in the order of the ranks.

        Raises:
            MisuseError: Types or numbers of dimensions differ, or shapes where gradients flow; on every rank.
        """

    @behaviour
    @abstractmethod
    def broadcast(self, obj: Any, src: int) -> Any:
        """Give every rank the object of one.

        Args:
            obj: Any picklable object on the rank ``src``; ignored on the others.
            src: The rank that it comes from.

        Raises:
            RequestError: There is no such rank.
        """

    @behaviour
    @abstractmethod
    def broadcast_tensors(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        """Give every rank the values of one rank's tensors, in place.

        Args:
            tensors: As many on every rank, each of the same shape and type; on any device, without gradients.
            src: The rank that the values come from.

        Raises:
            RequestError: There is no such rank.
        """

    @behaviour
    @abstractmethod
    def barrier(self, name: str | None) -> None:
        """Wait until every rank is here; the name is for messages."""

    @abstractmethod
    def fork(self) -> "Collectives":
        """Give collectives over the same ranks whose messages never meet those of this object; called on every rank."""

    def close(self) -> None:  # noqa: B027 - nothing to release is the usual case
        """Release resources. The core calls it when the ``Fabric`` ends; may be called again.

        Where there are several ranks, whoever calls another method afterwards is told by an error.
        """


class SingleProcess(Collectives):
    """One process alone: everything is checked as with several, and nothing is sent."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        """Give a copy."""
        result = tensor.detach().clone()
        if check_reduction(reduce_op) == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
            return result.to(torch.get_default_dtype())
        return result

    def all_gather(self, tensor: torch.Tensor, group: Any | None, sync_grads: bool) -> list[torch.Tensor]:
        """Give a copy, alone in its list."""
        return [tensor.clone() if sync_grads else tensor.detach().clone()]

    def broadcast(self, obj: Any, src: int) -> Any:
        """Return it."""
        check_source(src, 1)
        return obj

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        """Leave them."""
        check_source(src, 1)

    def barrier(self, name: str | None) -> None:
        """Everybody is here."""

    def fork(self) -> "SingleProcess":
        """Give itself: there are no messages to keep apart."""
        return self


def check_reduction(reduce_op: Any) -> str:
    """Give an operation's name in lower case; ``"avg"`` is ``"mean"``.

    Raises:
        RequestError: There is no such operation.
    """
    name = str(reduce_op).lower()
    if name not in _REDUCTIONS:
        raise RequestError(
            "there is no such reduction",
            where="all_reduce(reduce_op=)",
            got=repr(reduce_op),
            instead=", ".join(_REDUCTIONS),
        )
    return "mean" if name == "avg" else name


def check_source(src: int, world_size: int) -> None:
    """Refuse a rank that does not exist.

    Raises:
        RequestError: There is no such rank.
    """
    if not 0 <= src < world_size:
        raise RequestError(
            "there is no such rank",
            where="broadcast(src=)",
            got=repr(src),
            instead=f"a rank from 0 to {world_size - 1}",
        )
