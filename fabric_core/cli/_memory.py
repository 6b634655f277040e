"""What a step of a model takes in memory, measured on tensors that have shapes and types alone."""

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from fabric_core._torch import DispatchMode
from fabric_core.contracts import MemoryEstimate, Precision, Strategy, map_tensors

__all__ = ["Footprint", "convert", "measure", "runner", "train_once"]


@dataclass(frozen=True)
class Footprint:
    """What a step takes beside parameters, gradients and optimizer state, in bytes.

    Args:
        moments: What was computed and not freed yet, batch included, and which share of all gradients there was by
            then; the moments of ``forward`` and ``backward`` at which either was larger than before.
        step: The most that the optimizer's step takes for a time.
        kept: What lives on when ``backward`` has ended: the batch, and the output in a variable of the training's loop.
        gradients: All gradients of one process alone.
    """

    moments: tuple[tuple[int, float], ...]
    step: int
    kept: int
    gradients: int

    @property
    def activations(self) -> int:
        """The most that was computed and not freed."""
        return max(size for size, _ in self.moments)

    def peak(self, held: MemoryEstimate) -> int:
        """Give the most that a rank has at one time, which is less than the sum: not all of it is there at once."""
        beside = held.gradients if held.gradients_stay else 0
        training = held.in_flight + max(size + max(beside, share * held.gradients) for size, share in self.moments)
        # A divided optimizer steps on parts.
        stepping = self.step * held.gradients / max(1, self.gradients)
        after = held.gradients + self.kept + max(held.in_flight_last, stepping)
        return round(held.parameters + held.optimizer + max(training, after))


class _Live(DispatchMode):  # type: ignore[no-untyped-call]
    """Counts what lives of what is made inside: each storage once, until it is freed."""

    def __init__(self, begin: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.gradients = begin, 0
        self.moments = [(begin, 0)]
        self._known: dict[int, Any] = {}
        self._views = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {one.untyped_storage() for one in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in self._known and storage not in before:
                self._add(storage)
            elif storage in before:
                self._views[tensor] = None
        # Where a gradient has two halves, the engine adds the second to the first in place, if that is no view of
        # something; but not while someone looks on.
        if func is not torch.ops.aten.add.Tensor or args[0] in self._views:
            self._note()
        return result

    def _add(self, storage: Any) -> None:
        size, name = storage.nbytes(), id(storage)

        def freed(_: object) -> None:
            if self._known.pop(name, None) is not None:
                self.live -= size

        self._known[name] = weakref.ref(storage, freed)
        self.live += size

    def become_gradient(self, parameter: torch.Tensor) -> None:
        """Count the gradient of a parameter as one, and no longer among what else lives."""
        if parameter.grad is not None:
            storage = parameter.grad.untyped_storage()
            if self._known.pop(id(storage), None) is not None:
                self.live -= storage.nbytes()
            self.gradients += parameter.grad.numel() * parameter.grad.element_size()
            self._note()

    def _note(self) -> None:
        # Gradients only grow, so what counts is what is larger than all that comes after it.
        while self.moments and self.moments[-1][0] <= self.live:
            self.moments.pop()
        self.moments.append((self.live, self.gradients))


def train_once(run: Callable[[bool], torch.Tensor], optimizer: Optimizer) -> None:
    """Step once, so that there are gradients and the optimizer has its state."""
    run(True).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def measure(
    run: Callable[[bool], torch.Tensor], module: nn.Module, optimizer: Optimizer, batch: Any, dtype: torch.dtype | None
) -> Footprint:
    """Measure another step.

    Args:
        run: Computes the loss, in the precision's context or without.
        module: The model; it is left without gradients, and in the type below.
        optimizer: Its optimizer, which has stepped once.
        batch: What the model is given.
        dtype: The type that a strategy converts parameters to for ``forward``; ``None`` is their own.
    """
    gradients = MemoryEstimate.of(module, optimizer).gradients
    with _Live() as stepping:
        optimizer.step()
        step = max(size for size, _ in stepping.moments)
    module.zero_grad()
    if dtype is not None:
        _retype(module, dtype, buffers=False)
    with _Live(sum(one.numel() * one.element_size() for one in _tensors(batch))) as live:
        hooks = [
            one.register_post_accumulate_grad_hook(live.become_gradient)  # type: ignore[no-untyped-call]
            for one in module.parameters()
            if one.requires_grad
        ]
        run(dtype is None).backward()  # type: ignore[no-untyped-call]
        kept = live.live
    for hook in hooks:
        hook.remove()
    whole = max(1, live.gradients)
    return Footprint(tuple((size, share / whole) for size, share in live.moments), step, kept, gradients)


def convert(module: nn.Module, precision: Precision) -> nn.Module:
    """Convert a model as a precision does; a tensor without memory can't be replaced in place, as the contract does."""
    if type(precision).convert_module is not Precision.convert_module:
        return precision.convert_module(module)
    if precision.policy.param_dtype is not None:
        _retype(module, precision.policy.param_dtype, buffers=True)
    return module


def _retype(module: nn.Module, dtype: torch.dtype, *, buffers: bool) -> None:
    """Put new tensors in the place of a module's; one that several modules share stays shared."""
    new: dict[torch.Tensor, torch.Tensor] = {}
    for one in module.modules():
        named = [*one.named_parameters(recurse=False), *(one.named_buffers(recurse=False) if buffers else ())]
        for name, old in named:
            if not old.is_floating_point():
                continue
            if old not in new:
                to = old.detach().to(dtype)
                new[old] = nn.Parameter(to, old.requires_grad) if isinstance(old, nn.Parameter) else to
            setattr(one, name, new[old])


def runner(
    module: nn.Module, batch: Any, loss: Callable[[Any], torch.Tensor] | None, precision: Precision, strategy: Strategy
) -> tuple[Callable[[bool], torch.Tensor], torch.dtype | None]:
    """Give what computes the loss, in the precision's context or without, and the type to convert the model to.

    A strategy that carries out mixed precision computes in the type itself, in the place of the context; ``None`` where
    the context is what a training has.
    """
    policy = precision.policy
    itself = strategy.capabilities.applies_mixed_precision and policy.autocast

    kept: list[Any] = []
    """The output: a training's own loop holds it in a variable until the next one."""

    def run(within: bool) -> torch.Tensor:
        args, kwargs = precision.convert_input(_arguments(batch))
        # Inputs that stay as they are need the context, whoever converts the model.
        context = precision.forward_context("cpu") if within or policy.input_dtype is None else None
        with nullcontext() if context is None else context:
            output = module(*args, **kwargs)
        kept[:] = [precision.convert_output(output)]
        return _loss_of(kept[0]) if loss is None else loss(kept[0])

    return run, policy.compute_dtype if itself else None


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def _loss_of(output: Any) -> torch.Tensor:
    """Give the loss that a model returned, or else a mean over the first tensor."""
    found: Any = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    return _tensors(output)[0].float().mean() if found is None else found


def _tensors(data: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(one: torch.Tensor) -> torch.Tensor:
        found.append(one)
        return one

    map_tensors(data, note)
    return found
