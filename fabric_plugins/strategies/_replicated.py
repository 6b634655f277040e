"""PyTorch's DDP, of which the strategy knows every copy."""

from typing import Any
from weakref import WeakSet

from torch.nn.parallel import DistributedDataParallel

__all__ = ["Known", "Replicated"]


class Known(WeakSet[Any]):
    """The modules that hold on to the process group; copies of one share it, a pickle of one leaves it behind."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Known":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Known, ()


class Replicated(DistributedDataParallel):
    """Adds itself, and its deep copies, to what is known."""

    known: Known

    def know(self, known: Known) -> None:
        """Be known from now on."""
        self.known = known
        known.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.known.add(self)
