"""Knows which gradients were not averaged over the ranks, and refuses to step on them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core._torch import after_backward, in_backward
from fabric_core.contracts import Strategy, map_tensors
from fabric_core.errors import MisuseError
from fabric_core.wrapping.backward_guard import running_pass
from fabric_core.wrapping.notes import Notes, held_by, trainable

__all__ = ["GradientSync", "ModelSync", "gradient_sync"]


class GradientSync:
    """Watches the models of one ``Fabric`` under a strategy that averages gradients.

    [Note: unsynchronized gradients] A hook on each parameter notes that a gradient was added to it. At the end of the
    backward pass, after all that the strategy does then, the notes of a model are cleared if the strategy averaged: a
    synchronized forward pass came before, or none needs to, and the strategy says that it did. What is still noted when
    an optimizer steps belongs to this rank alone, however it came there, unless the script averaged it: then it is, or
    is equal to, what ``fabric.all_reduce`` gave since that backward pass.

    Args:
        strategy: The bound strategy.
        world_size: How many ranks it averages over.
        owner: Whose calls of ``fabric.backward`` are the strategy's too.
    """

    def __init__(self, strategy: Strategy, world_size: int, owner: object) -> None:
        self.strategy = strategy
        self.world_size = world_size
        self.owner = owner
        self.routed = strategy.capabilities.intercepts_forward
        self.averages_in_backward = getattr(type(strategy), "backward", None) is not Strategy.backward
        self.noted: WeakSet[ModelSync] = WeakSet()
        """The models of which something may be noted."""
        self._models: WeakSet[ModelSync] = WeakSet()
        self._ended: WeakSet[ModelSync] = WeakSet()
        self._made: WeakSet[nn.Module] = WeakSet()

    def made(self, inner: nn.Module) -> None:
        """Know a module that the strategy itself has made, or was given; a copy of it, it may not know."""
        self._made.add(inner)

    def averaged(self, inner: nn.Module | None, *, complete: bool) -> bool:
        """Ask the strategy whether it averaged a module's gradients."""
        if inner is None:
            return False
        asked = getattr(self.strategy.gradients_averaged, "__func__", None)
        if asked is Strategy.gradients_averaged and inner not in self._made:
            return False
        return self.strategy.gradients_averaged(inner, complete)

    def watch(self, module: nn.Module, inner: nn.Module) -> "ModelSync":
        """Watch a model.

        Args:
            module: The user's module.
            inner: What the strategy made of it; what shares it, as a shallow copy does, is watched with it.
        """
        for model in self._models:
            if model.inner() is inner:
                return model
        model = ModelSync(self, module, inner)
        self._models.add(model)
        return model

    def reduced(self, result: Any) -> None:
        """Take note of what the script reduced over all ranks, which may be gradients."""
        for model in list(self.noted):
            map_tensors(result, model.reduced)

    def check(self, optimizer: Optimizer) -> None:
        """Refuse to step on gradients that were not averaged.

        Raises:
            MisuseError: The optimizer holds such gradients.
        """
        if in_backward():
            held = held_by(optimizer)
            for model in list(self._models):
                model.check_early(optimizer, held)
        elif self._ended:
            held = held_by(optimizer)
            for model in list(self._ended):
                model.check_late(optimizer, held)
        elif self.noted:
            held = held_by(optimizer)
            for model in list(self.noted):
                model.check(optimizer, held)

    def forget(self, optimizer: Optimizer | None, module: nn.Module | None = None) -> None:
        """Take note that the gradients of an optimizer, or of a model, were cleared."""
        if self.noted:
            held = None if optimizer is None else held_by(optimizer)
            for model in list(self.noted):
                if held is not None:
                    model.forget(held)
                elif model.module() is module:
                    model.clear()

    def close(self) -> None:
        """Watch no more."""
        for model in list(self._models):
            model.close()
        self._ended.update(self._models)


class ModelSync(Notes):
    """What is noted of one model ([Note: unsynchronized gradients]).

    Args:
        sync: That of all models.
        module: The user's module.
        inner: What the strategy made of it.
    """

    def __init__(self, sync: GradientSync, module: nn.Module, inner: nn.Module) -> None:
        parameters = trainable(module)
        super().__init__(parameters)
        self.inner = ref(inner)
        self.module = ref(module)
        self._kind = type(module).__name__
        self._sync = sync
        self._expected = frozenset(index for index, (_, one) in enumerate(parameters) if one.requires_grad)
        """What is averaged: the parameters that were trainable at setup."""
        self._reached: set[int] = set()
        """What gradients were added to since the last synchronized forward pass."""
        self._skipping = 0
        """How many contexts of ``no_backward_sync`` this is inside of."""
        self._prepared = False
        """Whether a synchronized forward pass came, and no averaging since."""
        self._idle = True
        """Whether no backward pass is known to run."""
        self._why = ""
        self._reductions: list[torch.Tensor] = []
        """What the script reduced over all ranks since the last backward pass."""
        self._handles: list[Any] = []
        for index, (_, parameter) in enumerate(parameters):
            frozen = not parameter.requires_grad
            # PyTorch hooks only what is trainable; the hook stays when the parameter is frozen again.
            if frozen:
                parameter.requires_grad_(True)
            handle = parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]
            self._handles.append(handle)
            if frozen:
                parameter.requires_grad_(False)

    def _hook(self, index: int) -> Callable[[Any], None]:
        add = self._reached.add

        def added(_parameter: Any) -> None:
            add(index)
            if self._idle:
                self._begin()

        return added

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Take note of synchronized forward passes."""
        if not self._sync.routed:
            return run

        def noticed(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            if not self._skipping and torch.is_grad_enabled():
                self._prepare()
            return result

        return noticed

    def _prepare(self) -> None:
        self._prepared = self._idle = True
        if self._reached:
            self.noted |= self._reached
            self._reached.clear()

    @contextmanager
    def skipped(self, context: AbstractContextManager[Any]) -> Iterator[None]:
        """Know that passes inside a strategy's context leave gradients as they are."""
        self._skipping += 1
        try:
            with context:
                yield
        finally:
            self._skipping -= 1

    def _begin(self) -> None:
        """Know of a backward pass by its first gradient, and look again when it is over."""
        self._idle = False
        self._reductions.clear()
        self._sync.noted.add(self)
        call = running_pass(self._sync.owner)
        if call is None:
            after_backward(self._end_raw)
        else:
            call.at_end.append(self._end)
            call.at_failure.append(self._failed)

    def _failed(self) -> None:
        self._idle = True

    def _end_raw(self) -> None:
        """End a pass that went not through ``fabric.backward``: a strategy that averages there averaged nothing."""
        if self._sync.averages_in_backward:
            self._idle = True
            self._why = "loss.backward() was called directly, and the strategy averages in fabric.backward(loss)"
        else:
            self._end()

    def _end(self) -> None:
        self._idle = True
        inner, sync = self.inner(), self._sync
        if sync.routed and not self._prepared:
            self._why = (
                "the backward pass followed no forward pass of the model that fabric.setup returned, outside of"
                " fabric.no_backward_sync: none at all, or one that was averaged already"
            )
            return
        complete = len(self._reached) >= len(self._expected)
        if not sync.averaged(inner, complete=complete):
            missing = self.shown(sorted(self._expected - self._reached))
            self._why = f"the strategy waits for gradients of {missing}" if missing else "the strategy averaged nothing"
            return
        self._prepared = False
        if self._skipping:
            self._why = "the backward pass ran inside fabric.no_backward_sync"
            self.noted |= self._reached
            self._reached.clear()
        else:
            self.clear()
            if sync.noted:
                own = {id(one) for _, one in self.living()}
                for other in list(sync.noted):
                    other.forget(own)  # what models share was averaged for all of them

    def reduced(self, result: torch.Tensor) -> torch.Tensor:
        """Keep what may be one of the gradients, or hold several."""
        self._reductions.append(result)
        return result

    def _averaged_by_script(self, index: int) -> bool:
        parameter = self._references[index]()
        gradient = None if parameter is None else parameter.grad
        return gradient is None or any(_comes_from(gradient, one, self._sync.world_size) for one in self._reductions)

    def clear(self) -> None:
        """Forget everything, also that a pass runs: one that failed is over."""
        self._idle = True
        self._reductions.clear()
        self._reached.clear()
        self.noted.clear()
        self._sync.noted.discard(self)

    def forget(self, held: set[int]) -> None:
        """Forget what is noted of an optimizer's parameters."""
        self.noted |= self._reached
        super().forget(held)
        self._reached &= self.noted
        self.noted -= self._reached
        if not self.noted and not self._reached:
            self.clear()

    def check_early(self, optimizer: Optimizer, held: set[int]) -> None:
        """Refuse a step inside a backward pass, which is averaged at its end at the earliest.

        Raises:
            MisuseError: The optimizer holds parameters that have gradients.
        """
        self._refuse(
            optimizer,
            held,
            "a step inside a backward pass comes before the gradients are averaged over the ranks",
            got="optimizer.step() in a hook",
            instead="optimizer.step() after fabric.backward(loss)",
        )

    def check_late(self, optimizer: Optimizer, held: set[int]) -> None:
        """Refuse a step after the end of what averaged.

        Raises:
            MisuseError: The optimizer holds parameters that have gradients.
        """
        self._refuse(
            optimizer,
            held,
            "there is nobody any more to average gradients with",
            got="optimizer.step() after fabric.teardown()",
            instead="train before the teardown, or set the model up again",
        )

    def _refuse(self, optimizer: Optimizer, held: set[int], why: str, *, got: str, instead: str) -> None:
        found = [index for index, one in self.living() if id(one) in held and one.grad is not None]
        if found:
            where = f"{type(optimizer).__name__}.step, on gradients of {self._kind}: {self.shown(found)}"
            raise MisuseError(why, where=where, got=got, instead=instead)

    def check(self, optimizer: Optimizer, held: set[int]) -> None:
        """Refuse an optimizer that holds what is noted.

        Raises:
            MisuseError: It does.
        """
        self.noted |= self._reached
        found = self.with_gradients(held)
        if self._reductions:
            averaged = {index for index in found if self._averaged_by_script(index)}
            self.noted -= averaged
            found = [index for index in found if index not in averaged]
        self._reached &= self.noted
        if found:
            raise MisuseError(
                "gradients were not averaged over the ranks, so each would train a model of its own",
                where=f"{type(optimizer).__name__}.step, on gradients of {self._kind}: {self.shown(found)}",
                got=self._why or None,
                instead="run forward through the model that fabric.setup returned, and fabric.backward(loss) after it,"
                " both outside of fabric.no_backward_sync, at least the last time before each step; or average them"
                " yourself: p.grad = fabric.all_reduce(p.grad) for each parameter",
            )
        if not self.noted:
            self._reductions.clear()
            self._sync.noted.discard(self)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self.clear()


def _comes_from(gradient: torch.Tensor, reduced: torch.Tensor, world_size: int) -> bool:
    """Say whether a gradient lies in what was reduced, or is equal to it, or to a mean that was made of a sum."""
    if gradient is reduced:
        return True
    if gradient.layout is not torch.strided or reduced.layout is not torch.strided:
        return False
    if gradient.untyped_storage().data_ptr() == reduced.untyped_storage().data_ptr():
        return True
    if (gradient.shape, gradient.dtype, gradient.device) != (reduced.shape, reduced.dtype, reduced.device):
        return False
    rounding = 4 * torch.finfo(gradient.dtype).eps
    return any(torch.allclose(one, reduced, rounding, 0.0, equal_nan=True) for one in (gradient, gradient * world_size))


def gradient_sync(strategy: Strategy, world_size: int, owner: object) -> GradientSync | None:
    """Give what watches over averaging, where a strategy averages the gradients of whole models.

    One that shards parameters adds up gradients as it takes them from a backward pass, and refuses by itself.
    """
    declared = strategy.capabilities
    needed = world_size > 1 and declared.distributed and declared.synchronous and not declared.sharded
    return GradientSync(strategy, world_size, owner) if needed else None
