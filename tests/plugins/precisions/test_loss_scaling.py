"""16-mixed scales the loss as a loop with `torch.amp.GradScaler` in plain PyTorch does, whatever the gradients are."""

import math
from typing import Any, NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core import Fabric
from fabric_plugins.precisions import Float16MixedPrecision

FINITE = st.integers(-64, 64).map(float)
GRADIENT = st.one_of(FINITE, FINITE, FINITE, st.sampled_from([3e38, math.inf, math.nan]))
laws = settings(max_examples=100, deadline=None, derandomize=True, database=None)


class Toy(nn.Module):
    """Parameters whose gradients are exactly the numbers that go in."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(count)])

    def forward(self, gradients: list[float | None]) -> Tensor:
        """Give a loss with the given gradients; `None` leaves a parameter out."""
        terms = [
            (weight * gradient).sum()
            for weight, gradient in zip(self.weights, gradients, strict=True)
            if gradient is not None
        ]
        return torch.stack(terms).sum()


class Iteration(NamedTuple):
    """The gradients of each backward pass, for each optimizer; the norm to clip to; whether closures are used."""

    backwards: list[list[float | None]]
    max_norm: float | None
    closure: bool


@st.composite
def trainings(draw: st.DrawFn) -> tuple[list[str], list[Iteration]]:
    """Draw the kinds of one to three optimizers, and what happens in each iteration."""
    kinds = draw(st.lists(st.sampled_from(["sgd", "adamw", "fused"]), min_size=1, max_size=3))
    iterations = []
    for _ in range(draw(st.integers(1, 6))):
        backwards = draw(
            st.lists(
                st.lists(st.one_of(GRADIENT, st.none()), min_size=len(kinds), max_size=len(kinds)).filter(
                    lambda row: any(gradient is not None for gradient in row)
                ),
                min_size=1,
                max_size=3,
            )
        )
        closure = len(kinds) == 1 and draw(st.booleans())
        iterations.append(Iteration(backwards, None if closure else draw(st.sampled_from([None, 1.0, 50.0])), closure))
    return kinds, iterations


def build(kinds: list[str]) -> tuple[Toy, list[Optimizer]]:
    """Make a model and an optimizer of each kind, one for each parameter."""
    model = Toy(len(kinds))
    optimizers: list[Optimizer] = []
    for kind, weight in zip(kinds, model.weights, strict=True):
        if kind == "sgd":
            optimizers.append(torch.optim.SGD([weight], lr=0.125, momentum=0.5))
        else:
            optimizers.append(torch.optim.AdamW([weight], lr=0.125, fused=kind == "fused"))
    return model, optimizers


def by_hand(kinds: list[str], iterations: list[Iteration]) -> list[Any]:
    """Train with PyTorch alone; record scale and parameters after each iteration."""
    model, optimizers = build(kinds)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    record: list[Any] = []
    for iteration in iterations:
        for optimizer in optimizers:
            optimizer.zero_grad()
        for gradients in iteration.backwards:
            scaler.scale(model(gradients)).backward()
        for weight, optimizer in zip(model.weights, optimizers, strict=True):
            if weight.grad is None:
                continue
            if iteration.max_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_([weight], iteration.max_norm)
            scaler.step(optimizer)
        scaler.update()
        record.append((scaler.get_scale(), [weight.detach().tolist() for weight in model.weights]))
    return record


def by_fabric(kinds: list[str], iterations: list[Iteration]) -> list[Any]:
    """Train the same through the façade."""
    model, optimizers = build(kinds)
    precision = Float16MixedPrecision(init_scale=4.0, growth_interval=2)
    with Fabric(accelerator="cpu", devices=1, precision=precision) as fabric:
        wrapped, *steppers = fabric.setup(model, *optimizers)
        record: list[Any] = []
        for iteration in iterations:

            def evaluate(rows: list[list[float | None]] = iteration.backwards) -> None:
                for stepper in steppers:
                    stepper.zero_grad()
                for gradients in rows:
                    fabric.backward(wrapped(gradients))

            if iteration.closure:
                steppers[0].step(evaluate)
            else:
                evaluate()
                for stepper in steppers:
                    if iteration.max_norm is not None:
                        fabric.clip_gradients(wrapped, stepper, max_norm=iteration.max_norm)
                for stepper in steppers:
                    stepper.step()
            record.append((precision.state_dict()["scale"], [weight.detach().tolist() for weight in model.weights]))
    return record


@laws
@given(trainings())
def test_every_training_equals_a_loop_written_by_hand(training: tuple[list[str], list[Iteration]]) -> None:
    """Parameters and scale agree bit for bit after every iteration, so the same steps were skipped."""
    assert repr(by_fabric(*training)) == repr(by_hand(*training))


MOVES = st.one_of(
    st.tuples(st.just("backward"), st.lists(FINITE.map(lambda x: x or 1.0), min_size=2, max_size=2)),
    st.tuples(st.just("backward"), st.tuples(FINITE, st.none()).map(list)),
    st.tuples(st.sampled_from(["clip", "step", "save"]), st.integers(0, 1)),
)


@laws
@given(st.lists(MOVES, min_size=5, max_size=30))
def test_whatever_the_order_nothing_is_mixed_up(moves: list[tuple[str, Any]]) -> None:
    """While nothing overflows, any order of calls trains as without scaling, while the scale keeps doubling."""

    def train(precision: Any) -> list[list[float]]:
        model, optimizers = build(["sgd", "sgd"])
        with Fabric(accelerator="cpu", devices=1, precision=precision) as fabric:
            wrapped, *steppers = fabric.setup(model, *optimizers)
            for move, what in moves:
                if move == "backward":
                    fabric.backward(wrapped(what))
                elif move == "clip":
                    fabric.clip_gradients(wrapped, steppers[what], clip_val=40.0)
                elif move == "save":
                    fabric.precision.state_dict()
                else:
                    steppers[what].step()
                    steppers[what].zero_grad()
        return [weight.detach().tolist() for weight in model.weights]

    assert train(Float16MixedPrecision(init_scale=4.0, growth_interval=1)) == train("32-true")
