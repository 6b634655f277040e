"""Rules for strategies: optimizers, made whenever and stepped however."""

from typing import Final

import torch
from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training, distance
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import (
    ALWAYS,
    How,
    check_training,
    loss_of,
    set_up,
    whole,
)

TABLE: Final = Table("strategy", inside=False)


@TABLE.rule(
    "STR-324",
    "An optimizer that was made before the model's setup, and is set up after it, trains the model.",
    reason="An optimizer of parameters that were replaced steps, and trains nothing.",
    advice="replace parameters in setup_optimizer as `replaced` says, or refuse with SetupError",
    lacks=("joint_setup",),
    world_sizes=ALWAYS,
    examples=cases.trainings(),
    count=3,
)
def _optimizer_before(bench: Bench, case: Training) -> None:
    check_training(bench, case, How(optimizer="before"))


@TABLE.rule(
    "STR-325",
    "An optimizer that is made after the model's setup trains the model.",
    reason="It is the other usual order.",
    advice="leave parameters in setup_optimizer that are in no `replaced`",
    lacks=("joint_setup",),
    world_sizes=ALWAYS,
    examples=cases.trainings(),
    count=3,
)
def _optimizer_after(bench: Bench, case: Training) -> None:
    check_training(bench, case, How(optimizer="after"))


@TABLE.rule(
    "STR-328",
    "Two optimizers that share a model's parameters between them train it as one does.",
    reason="Different parts learn at different rates.",
    advice="make every optimizer ready on its own, or take multiple_optimizers out of the capabilities",
    needs=("multiple_optimizers",),
    world_sizes=ALWAYS,
    examples=cases.trainings(frozen=False),
    count=2,
)
def _several_optimizers(bench: Bench, case: Training) -> None:
    check_training(bench, case, How(several_optimizers=True))


def _closure(place: Place) -> tuple[float, float, bool, int]:
    """Step with a closure, and run a graph backward twice."""
    case = Training(optimizer="sgd")
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = set_up(fabric, case, How())
        (x, y), _ = cases.batches(case)
        calls = []

        def closure() -> torch.Tensor:
            calls.append(1)
            stepper.zero_grad()
            loss = loss_of(fabric, wrapped, How(), case, x, y)
            fabric.backward(loss)
            return loss

        result = stepper.step(closure)
        stepper.zero_grad()
        plain = cases.build(case)
        optimizer = cases.optimizer_for(case, plain.parameters())
        nn.functional.mse_loss(plain(x), y).backward()
        optimizer.step()
        off = distance(whole(fabric, model), cases.copied(plain))
        value = float("nan") if result is None else float(result.detach())
        return off, value, isinstance(result, torch.Tensor), len(calls)


@TABLE.rule(
    "STR-330",
    "A step with a closure runs it as often as the optimizer asks, steps, and returns what it returned.",
    reason="It is the contract of torch.optim.Optimizer.step.",
    advice="return optimizer.step(closure)",
    world_sizes=ALWAYS,
)
def _closures(bench: Bench) -> None:
    for rank, (off, value, is_tensor, calls) in enumerate(bench.run(_closure)):
        if calls != 1:
            raise Broken(f"rank {rank}: SGD asks once, and the closure ran {calls} times")
        if not is_tensor or not value >= 0:
            raise Broken(f"rank {rank}: step(closure) returns {value}")
        if not off <= exact():
            raise Broken(f"rank {rank}'s parameters differ by {off:.3g}")
