"""What the façade does, as behaviours that an extension may wrap with ``@around.fabric``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from fabric_core.markers import behaviour

__all__ = ["FabricActs"]


class FabricActs:
    """The façade's own acts; the ``Fabric`` owns each, and an extension goes round it with ``@around.fabric``.

    An extension that needs the ``Fabric`` itself keeps what the life-cycle hook ``configured`` gives it.
    """

    kind: ClassVar[str] = "fabric"

    @behaviour
    def setup(self, module: Any, optimizers: Sequence[Optimizer], move_to_device: bool) -> tuple[Any, Sequence[Any]]:
        """Make a model and its optimizers ready: ``fabric.setup`` and ``fabric.setup_module``.

        Returns:
            The wrapped model, and the wrapped optimizers in the same order.
        """
        raise AssertionError("a Fabric has acts of its own")

    @behaviour
    def backward(self, tensor: torch.Tensor, model: Any, arguments: Mapping[str, Any]) -> None:
        """Run ``fabric.backward``.

        Args:
            tensor: What to differentiate, not scaled yet.
            model: The model that the user named, or ``None``.
            arguments: Keyword arguments of ``torch.Tensor.backward``.
        """
        raise AssertionError("a Fabric has acts of its own")

    @behaviour
    def step(self, optimizer: Any, closure: Callable[[], Any] | None) -> Any:
        """Step a wrapped optimizer, through precision and strategy; gives what its ``step`` gives."""
        raise AssertionError("a Fabric has acts of its own")

    @behaviour
    def save(self, path: Any, state: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Run ``fabric.save``; ``options`` holds its further arguments by name."""
        raise AssertionError("a Fabric has acts of its own")

    @behaviour
    def load(self, path: Any, state: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Run ``fabric.load``; ``options`` holds its further arguments by name."""
        raise AssertionError("a Fabric has acts of its own")
