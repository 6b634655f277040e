"""Refuses a raw ``loss.backward()`` where only ``fabric.backward(loss)`` gives right gradients."""

import inspect
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer

from fabric_core._torch import backward_state, set_backward_state
from fabric_core.contracts import Precision, Strategy, map_tensors
from fabric_core.errors import MisuseError
from fabric_core.wrapping.notes import Notes, held_by, trainable

__all__ = ["BackwardGuard", "BackwardPass", "backward_guard", "running_pass"]


class BackwardPass:
    """One call of ``fabric.backward``; what it computes on this thread, or on an engine's for it, is part of it.

    Args:
        owner: Who calls, compared by identity.
    """

    __slots__ = ("_outer", "at_end", "at_failure", "owner")

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.at_end: list[Callable[[], None]] = []
        self.at_failure: list[Callable[[], None]] = []
        self._outer: BackwardPass | None = None

    @property
    def outer(self) -> "BackwardPass | None":
        """The call inside which this one was made, from a hook."""
        return self._outer

    def __enter__(self) -> None:
        """Begin."""
        self._outer = backward_state()
        set_backward_state(self)

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """End, and do what was to be done then."""
        set_backward_state(self._outer)
        self._outer = None
        for do in self.at_end if kind is None else self.at_failure:
            do()


def running_pass(owner: object) -> BackwardPass | None:
    """Give the owner's call of ``fabric.backward`` that this is part of, if it is part of one."""
    one: BackwardPass | None = backward_state()
    while one is not None and one.owner is not owner:
        one = one.outer
    return one


class BackwardGuard:
    """Watches the models of one ``Fabric``.

    Args:
        owner: Whose backward passes are let through.
        why: Who needs ``fabric.backward``, for the message.
    """

    def __init__(self, owner: object, why: str) -> None:
        self._owner = owner
        self._why = why

    def watch_module(self, module: nn.Module) -> None:
        """Watch a model's parameters."""

    def watch_optimizer(self, optimizer: Optimizer) -> None:
        """Watch an optimizer's parameters."""

    def around(
        self,
        run: Callable[..., Any],
        module: nn.Module,  # noqa: ARG002 - for the subclasses
        device: torch.device,  # noqa: ARG002 - for the subclasses
    ) -> Callable[..., Any]:
        """Watch the outputs of a model's runs.

        Args:
            run: Runs the model.
            module: The user's module.
            device: The device that it is on.
        """
        return run

    def scaled(self, optimizer: Optimizer) -> str | None:  # noqa: ARG002 - for the subclasses
        """Name parameters of an optimizer whose gradients come from ``fabric.backward``, if there are such."""
        return None

    def forget(self, optimizer: Optimizer | None, module: nn.Module | None = None) -> None:
        """Take note that the gradients of an optimizer, or of a model, were cleared."""

    def close(self) -> None:
        """Watch no more."""

    def _refuse(self, where: str) -> MisuseError:
        return MisuseError(
            f"loss.backward() was called directly, and {self._why}",
            where=where,
            got="loss.backward()",
            instead="fabric.backward(loss)",
        )


class ParameterGuard(BackwardGuard):
    """Watches where gradients arrive: at the parameters themselves.

    A node accumulates a parameter's gradient, in every backward pass that accumulates into leaves, and in no other: not
    in ``torch.autograd.grad``, a jacobian or ``torch.func``. What is hooked to it runs before anything is added. So no
    loss is missed, whether it came from the model, from a part of it, or from its parameters alone.
    """

    def __init__(self, owner: object, why: str) -> None:
        super().__init__(owner, why)
        self._watched: WeakKeyDictionary[Any, _Watched] = WeakKeyDictionary()
        self._with_notes: WeakSet[_Watched] = WeakSet()

    def watch_module(self, module: nn.Module) -> None:
        """Watch a model's parameters; those that it has now, where it was watched before."""
        self._watch(module, trainable(module))

    def watch_optimizer(self, optimizer: Optimizer) -> None:
        """Watch those of an optimizer's parameters that belong to no model."""
        inside = {id(one) for key in list(self._watched) if isinstance(key, nn.Module) for one in key.parameters()}
        outside = [one for group in optimizer.param_groups for one in group["params"] if id(one) not in inside]
        self._watch(optimizer, [(f"parameter {index}", one) for index, one in enumerate(outside) if one.is_leaf])

    def _watch(self, key: Any, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        before = self._watched.pop(key, None)
        if before is not None:
            before.close()
            self._with_notes.discard(before)
        named = list(parameters)
        if named:
            self._watched[key] = _Watched(named, key, self._owner, self._with_notes, self._refuse)

    def scaled(self, optimizer: Optimizer) -> str | None:
        """As the base class says."""
        if not self._with_notes:
            return None
        held = held_by(optimizer)
        for notes in list(self._with_notes):
            found = notes.with_gradients(held)
            if found:
                return notes.shown(found)
        return None

    def forget(self, optimizer: Optimizer | None, module: nn.Module | None = None) -> None:
        """As the base class says."""
        if not self._with_notes:
            return
        held = None if optimizer is None else held_by(optimizer)
        for notes in list(self._with_notes):
            if held is not None:
                notes.forget(held)
            elif notes.of() is module:
                notes.noted.clear()
            if not notes.noted:
                self._with_notes.discard(notes)

    def close(self) -> None:
        """As the base class says."""
        for notes in self._watched.values():
            notes.close()
        self._watched.clear()
        self._with_notes.clear()


class _Watched(Notes):
    """The nodes of some parameters: they are kept, because a parameter itself holds its own but weakly.

    Args:
        parameters: Their names and themselves.
        key: The model or optimizer that they are of.
        owner: Whose backward passes are let through.
        with_notes: Where it adds itself when something is noted.
        refuse: Makes the error for any other backward pass.
    """

    def __init__(
        self,
        parameters: list[tuple[str, torch.Tensor]],
        key: Any,
        owner: object,
        with_notes: "WeakSet[_Watched]",
        refuse: Callable[[str], MisuseError],
    ) -> None:
        super().__init__(parameters)
        self.of = ref(key)
        self._nodes: list[Any] = []
        self._handles: list[Any] = []
        note, noted, own = self.noted.add, self.noted, ref(self)
        for index, (name, parameter) in enumerate(parameters):
            frozen = not parameter.requires_grad
            # Only what is trainable has a node; it stays when the parameter is frozen again.
            if frozen:
                parameter.requires_grad_(True)
            node = get_gradient_edge(parameter).node
            if frozen:
                parameter.requires_grad_(False)

            def arrived(_gradients: Any, index: int = index, name: str = name) -> None:
                if running_pass(owner) is None:
                    raise refuse(f"the gradient of {name}")
                if not noted:
                    with_notes.add(own())  # type: ignore[arg-type] # what has nodes is alive
                note(index)

            self._nodes.append(node)
            self._handles.append(node.register_prehook(arrived))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._nodes.clear()


class OutputGuard(BackwardGuard):
    """Watches what models give, for strategies whose parameters may be no leaves of a backward pass.

    [Note: the sentinel] Every output of a watched model depends on a scalar leaf of the model's own, by an identity
    whose gradient for it is none. So the leaf's accumulation runs in every backward pass that accumulates into leaves,
    before that of any parameter, and in no other. Nothing is hooked to a parameter or to an output.
    """

    def around(self, run: Callable[..., Any], module: nn.Module, device: torch.device) -> Callable[..., Any]:
        """As the base class says."""
        leaf = torch.zeros((), device=device, requires_grad=True)
        # The leaf itself holds its node but weakly.
        node = get_gradient_edge(leaf).node

        def check(_gradients: Any) -> None:
            if running_pass(self._owner) is None and any(one.requires_grad for one in module.parameters()):
                raise self._refuse(f"backward of an output of {type(module).__name__}")

        node.register_prehook(check)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            return map_tensors(result, tie) if torch.is_grad_enabled() else result

        def tie(output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad or node is None:
                return output
            tied: torch.Tensor = _Tie.apply(output, leaf)  # type: ignore[no-untyped-call]
            return tied

        return watched


class BothGuard(OutputGuard, ParameterGuard):
    """Watches what models give, and those parameters that are leaves of a backward pass."""


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


def backward_guard(strategy: Strategy, precision: Precision, owner: object) -> BackwardGuard | None:
    """Give a guard where the strategy or the precision needs ``fabric.backward``."""
    declared = strategy.capabilities
    if precision.policy.loss_scaling:
        why = "the precision scales the loss, so the gradients would be too small"
        guard = BothGuard if declared.sharded or declared.joint_setup else ParameterGuard
        return guard(owner, why)
    if declared.requires_strategy_backward:
        return OutputGuard(owner, "the strategy runs backward passes itself")
    return None
