"""Rules for precisions: where whole trainings end."""

from typing import Final

import torch
from torch import nn

from fabric_core.conformance import cases, snapshot
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.precision.measures import CASE, DTYPES, tolerance

TABLE: Final = Table("precision")


def _train(place: Place, case: cases.Training) -> tuple[cases.Weights, tuple[int, ...], list[str]]:
    """Train; give the parameters, which steps left them as they were, and which settings are changed."""
    before = snapshot.take()
    skipped = []
    with place.fabric() as fabric:
        model = cases.build(case, torch.float32)
        wrapped, stepper = fabric.setup(model, cases.optimizer_for(case, model.parameters()))
        for index, (x, y) in enumerate(cases.batches(case, torch.float32)):
            out = wrapped(x.to(fabric.device))
            fabric.backward(nn.functional.mse_loss(out, y.to(out)))
            old = cases.copied(model)
            stepper.step()
            stepper.zero_grad()
            if cases.distance(old, cases.copied(model)) == 0:
                skipped.append(index)
        trained = {name: tensor.double().cpu() for name, tensor in cases.copied(model).items()}
    return trained, tuple(skipped), snapshot.differences(before)


@TABLE.rule(
    "PRE-233",
    "A short training ends where plain PyTorch's does, to the policy's accuracy.",
    reason="It is what a precision is for: the same training in other types.",
    advice="compare gradients and steps with plain PyTorch's one by one",
    examples=cases.trainings(optimizer="sgd"),
    count=6,
)
def _trains(bench: Bench, case: cases.Training) -> None:
    trained, skipped, _ = bench.run(_train, case)[0]
    # The first scale may be too large for 16 bits; that a step is made at all is another rule.
    scales = bench.plugin().policy.loss_scaling
    off = cases.distance(trained, cases.trained_alone(case, skipped if scales else ()))
    if not off <= case.steps * tolerance(bench.plugin().policy):
        raise Broken(f"after {case.steps} steps the parameters differ by {off:.2g}")


@TABLE.rule(
    "PRE-234",
    "After a training and its teardown the process is as before: PyTorch's settings, random numbers, hooks, variables.",
    reason="Another Fabric in the same process may ask for another precision.",
    advice="change settings inside contexts alone",
    inside=False,
)
def _leaves_settings(bench: Bench) -> None:
    _, _, left = bench.run_apart(_train, CASE)[0]
    if left:
        raise Broken(f"{', '.join(left)} is changed")


def _train_parts(place: Place, case: cases.Training) -> cases.Weights:
    with place.fabric() as fabric:
        model = cases.build(case, torch.float32)
        wrapped, stepper = fabric.setup(model, cases.optimizer_for(case, model.parameters()))
        shard = fabric.strategy.data_shard()
        for x, y in cases.batches(case, torch.float32):
            out = wrapped(cases.part(x, shard).to(fabric.device))
            fabric.backward(nn.functional.mse_loss(out, cases.part(y, shard).to(out)))
            stepper.step()
            stepper.zero_grad()
        return {name: tensor.double().cpu() for name, tensor in cases.copied(model).items()}


@TABLE.rule(
    "PRE-241",
    "A short training on two ranks ends on both where plain PyTorch's in one process does, to the policy's accuracy.",
    reason="Most trainings in few digits are distributed.",
    advice="decide over the ranks together, and keep nothing that differs between them",
    lacks=("loss_scaling",),
    world_sizes=(2,),
)
def _trains_on_two(bench: Bench) -> None:
    case = cases.Training(steps=3, rows=2, optimizer="sgd")
    expected = cases.trained_alone(case)
    dtypes = [bench.declared.get(name) for name in DTYPES]
    allowed = 32 * max([torch.finfo(torch.float32).eps, *(torch.finfo(dtype).eps for dtype in dtypes if dtype)])
    first, *others = bench.run(_train_parts, case)
    if not cases.distance(first, expected) <= case.steps * allowed:
        raise Broken(f"rank 0's parameters differ by {cases.distance(first, expected):.2g}")
    if any(cases.distance(first, other) != 0 for other in others):
        raise Broken("the ranks end with different parameters")
