"""Rules for strategies: no step is made on gradients that each rank has of its own, whatever way they came about."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training, Weights, distance, part
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import SEVERAL, How, set_up, whole

TABLE: Final = Table("strategy", inside=False)


class _Run:
    """One run of a short script, under the strategy or in plain PyTorch, where the rows are all there are.

    Args:
        fabric: The Fabric, or ``None``.
    """

    def __init__(self, fabric: Any) -> None:
        self.fabric = fabric
        self.models: list[cases.Net] = []
        self._batch = next(cases.batches(Training()))

    def set_up(self, seed: int = 0) -> tuple[cases.Net, Any, Any]:
        """Give a model, what is called in its place, and its optimizer."""
        case = Training(seed=seed, optimizer="sgd")
        if self.fabric is None:
            model = cases.build(case)
            found: tuple[cases.Net, Any, Any] = model, model, cases.optimizer_for(case, model.parameters())
        else:
            model, wrapped, (stepper,) = set_up(self.fabric, case, How())
            found = model, wrapped, stepper
        self.models.append(found[0])
        return found

    def loss(self, called: Any, *, of_part: bool = False) -> torch.Tensor:
        """Run a model, or the last layer of one, on this rank's part of the batch."""
        shard = (0, 1) if self.fabric is None else self.fabric.strategy.data_shard()
        x, y = (part(one, shard) for one in self._batch)
        if of_part:
            x = torch.cat([x, x[:, :1]], 1)  # as wide as what the layer before gives
        if self.fabric is not None:
            x, y = x.to(self.fabric.device), y.to(self.fabric.device)
        return nn.functional.mse_loss(called(x), y)

    def backward(self, loss: torch.Tensor) -> None:
        """Run a backward pass."""
        torch.autograd.backward(loss) if self.fabric is None else self.fabric.backward(loss)

    def apart(self, called: Any) -> AbstractContextManager[Any]:
        """Skip gradient synchronization."""
        return contextlib.nullcontext() if self.fabric is None else self.fabric.no_backward_sync(called)


def _all_apart(run: _Run) -> None:
    _, called, optimizer = run.set_up()
    with run.apart(called):
        run.backward(run.loss(called))
    optimizer.step()


def _forward_apart(run: _Run) -> None:
    _, called, optimizer = run.set_up()
    with run.apart(called):
        loss = run.loss(called)
    run.backward(loss)
    optimizer.step()


def _backward_apart(run: _Run) -> None:
    _, called, optimizer = run.set_up()
    loss = run.loss(called)
    with run.apart(called):
        run.backward(loss)
    optimizer.step()


def _closure_apart(run: _Run) -> None:
    _, called, optimizer = run.set_up()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        with run.apart(called):
            loss = run.loss(called)
            run.backward(loss)
        return loss

    optimizer.step(closure)


def _raw_model(run: _Run) -> None:
    model, _, optimizer = run.set_up()
    run.backward(run.loss(model))
    optimizer.step()


def _raw_part(run: _Run) -> None:
    model, _, optimizer = run.set_up()
    run.backward(run.loss(model.outer, of_part=True))
    optimizer.step()


def _raw_part_after_forward(run: _Run) -> None:
    model, called, optimizer = run.set_up()
    run.loss(called)
    run.backward(run.loss(model.outer, of_part=True))
    optimizer.step()


def _raw_part_after_pass(run: _Run) -> None:
    model, called, optimizer = run.set_up()
    run.backward(run.loss(called))
    run.backward(run.loss(model.outer, of_part=True))
    optimizer.step()


def _raw_closure(run: _Run) -> None:
    model, _, optimizer = run.set_up()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = run.loss(model)
        run.backward(loss)
        return loss

    optimizer.step(closure)


def _one_of_two_apart(run: _Run) -> None:
    _, called, optimizer = run.set_up(1)
    _, other, second = run.set_up(2)
    with run.apart(called):
        run.backward(run.loss(called))
    run.backward(run.loss(other))
    second.step()
    optimizer.step()


def _one_of_two_raw(run: _Run) -> None:
    model, _, optimizer = run.set_up(1)
    _, other, second = run.set_up(2)
    run.backward(run.loss(model) + run.loss(other))
    second.step()
    optimizer.step()


def _cleared(run: _Run) -> None:
    _, called, optimizer = run.set_up()
    with run.apart(called):
        run.backward(run.loss(called))
    optimizer.zero_grad()
    run.backward(run.loss(called) * 2)
    optimizer.step()


_SCRIPTS: Final[Mapping[str, Callable[[_Run], None]]] = {
    "the last pass before a step inside no_backward_sync": _all_apart,
    "a forward pass inside no_backward_sync, its backward pass after it": _forward_apart,
    "a backward pass inside no_backward_sync, its forward pass before it": _backward_apart,
    "a closure that runs inside no_backward_sync": _closure_apart,
    "a pass of the user's own module": _raw_model,
    "a pass of a part of the user's module": _raw_part,
    "a pass of a part of the user's module, after a forward pass that isn't used": _raw_part_after_forward,
    "a pass of the whole model, then one of a part of the user's module": _raw_part_after_pass,
    "a closure that runs the user's own module": _raw_closure,
    "two models, one of them inside no_backward_sync": _one_of_two_apart,
    "two models, the user's own module in the place of one": _one_of_two_raw,
    "a pass inside no_backward_sync, zero_grad, and another one": _cleared,
}


def _run(place: Place, name: str) -> list[Weights] | str:
    """Run a script; give the models, or the error."""
    with place.fabric() as fabric:
        run = _Run(fabric)
        try:
            _SCRIPTS[name](run)
        except Exception as error:  # noqa: BLE001 - backends have errors of their own, and any is no silence
            return f"{type(error).__name__}: {error}"
        return [whole(fabric, model) for model in run.models]


def _alone(name: str) -> list[Weights]:
    run = _Run(None)
    _SCRIPTS[name](run)
    return [cases.copied(model) for model in run.models]


def _check(bench: Bench, scripts: Sequence[Callable[[_Run], None]], *, may_raise: bool = True) -> None:
    """Refuse that ranks end elsewhere than one process does, and that some raise where others don't."""
    for name in (one for one, script in _SCRIPTS.items() if script in scripts):
        results, expected = bench.run(_run, name), _alone(name)
        raised = [got for got in results if isinstance(got, str)]
        if may_raise and len(raised) == len(results):
            continue
        for rank, got in enumerate(results):
            if isinstance(got, str):
                raise Broken(f"{name}: rank {rank} raised{', and others did not' if may_raise else ''}: {got}")
            off = max(distance(one, other) for one, other in zip(got, expected, strict=True))
            if not off <= exact():
                raise Broken(f"{name}: rank {rank}'s parameters differ by {off:.3g}, and nothing was said")


@TABLE.rule(
    "STR-366",
    "A step on gradients that were gathered inside `no_backward_sync` and not averaged since raises on every rank, or "
    "trains as one process does; also in a closure.",
    reason="A forgotten last pass trains a model of its own on each rank, and the script ends as if all were well.",
    advice="refuse in optimizer_step, after each evaluation of a closure too; or declare synchronous=False",
    needs=("distributed", "synchronous"),
    world_sizes=SEVERAL,
)
def _refuses_apart(bench: Bench) -> None:
    _check(bench, (_all_apart, _forward_apart, _backward_apart, _closure_apart))


@TABLE.rule(
    "STR-368",
    "A step on gradients that came from the user's own module, or from a part of it, called directly, raises on "
    "every rank, or trains as one process does.",
    reason="Calling the raw model is the mistake that users make most, and each rank trains alone by it.",
    advice="let gradients_averaged say what was averaged, or refuse in optimizer_step; or declare synchronous=False",
    needs=("distributed", "synchronous"),
    world_sizes=SEVERAL,
)
def _refuses_raw(bench: Bench) -> None:
    _check(bench, (_raw_model, _raw_part, _raw_part_after_forward, _raw_part_after_pass, _raw_closure))


@TABLE.rule(
    "STR-369",
    "Of two models that are stepped together, one whose gradients were not averaged raises on every rank, or trains as "
    "one process does.",
    reason="Where one model is right, the other's mistake must not hide behind it.",
    advice="know for each module whether its gradients were averaged; or declare synchronous=False",
    needs=("distributed", "synchronous", "multiple_models"),
    world_sizes=SEVERAL,
)
def _refuses_one_of_two(bench: Bench) -> None:
    _check(bench, (_one_of_two_apart, _one_of_two_raw))


@TABLE.rule(
    "STR-383",
    "Gradients that were gathered inside `no_backward_sync` and cleared by the optimizer's `zero_grad` are gone: the "
    "next step is that of the passes after it.",
    reason="A script drops a group of batches, and goes on.",
    advice="clear in gradients_cleared what is kept elsewhere than in `grad`",
    needs=("distributed", "synchronous"),
    world_sizes=SEVERAL,
)
def _clears(bench: Bench) -> None:
    _check(bench, (_cleared,), may_raise=False)
