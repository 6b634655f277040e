"""Tells a raw ``loss.backward()`` where only ``fabric.backward(loss)`` gives right gradients."""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge

from fabric_core.contracts import Precision, Strategy, map_tensors
from fabric_core.errors import MisuseError

__all__ = ["BackwardGuard", "backward_guard"]


class BackwardGuard:
    """Watches the models of one ``Fabric``.

    [Note: the sentinel] Every output of a watched model depends on a scalar leaf of the model's own, by an identity
    whose gradient for it is none. So the leaf's accumulation runs in every backward pass that accumulates into leaves,
    before that of any parameter, and in no other: not in ``torch.autograd.grad``, a jacobian or ``torch.func``.
    Nothing is hooked to a parameter or to an output.

    Args:
        why: Who needs ``fabric.backward``, for the message.
    """

    def __init__(self, why: str) -> None:
        self._why = why
        self._running = 0
        self._lock = threading.Lock()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let backward passes through; on any thread, for the engine has threads of its own."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def around(self, run: Callable[..., Any], module: nn.Module, device: torch.device) -> Callable[..., Any]:
        """Watch the outputs of a model's runs.

        Args:
            run: Runs the model.
            module: The user's module.
            device: The device that it is on.
        """
        leaf = torch.zeros((), device=device, requires_grad=True)
        # The leaf itself holds its node but weakly.
        node = get_gradient_edge(leaf).node

        def look(_gradients: Any) -> None:
            if not self._running and any(parameter.requires_grad for parameter in module.parameters()):
                raise MisuseError(
                    f"this backward pass went past Fabric, and {self._why}",
                    where=f"backward of an output of {type(module).__name__}",
                    got="loss.backward()",
                    instead="fabric.backward(loss)",
                )

        node.register_prehook(look)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            return map_tensors(result, tie) if torch.is_grad_enabled() else result

        def tie(output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad or node is None:
                return output
            tied: torch.Tensor = _Tie.apply(output, leaf)  # type: ignore[no-untyped-call]
            return tied

        return watched


class _Tie(Function):
    """The identity of its first argument, which depends on the second too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: torch.Tensor, _leaf: torch.Tensor) -> torch.Tensor:
        # No view, which could not be changed in place; the memory and its version are shared all the same.
        return output.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None

    @staticmethod
    def jvp(_ctx: Any, tangent: torch.Tensor, _leaf: torch.Tensor | None) -> torch.Tensor:
        return tangent


# `apply` asks for it each time, and working it out takes longer than all the rest.
_Tie.forward.__signature__ = inspect.signature(_Tie.forward)  # type: ignore[attr-defined]


def backward_guard(strategy: Strategy, precision: Precision) -> BackwardGuard | None:
    """Give a guard where the strategy or the precision needs ``fabric.backward``."""
    if precision.policy.loss_scaling:
        return BackwardGuard("the precision scales the loss, so the gradients would be too small")
    if strategy.capabilities.requires_strategy_backward:
        return BackwardGuard("the strategy runs backward passes itself")
    return None
