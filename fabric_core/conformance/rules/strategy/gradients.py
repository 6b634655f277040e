"""Rules for strategies: the gradients of several processes are those of one."""

from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from fabric_core.conformance import cases, zoo
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training, Weights, distance, part
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import (
    ALWAYS,
    SEVERAL,
    How,
    check_mean,
    check_training,
    gap,
    local,
    loss_of,
    one_pass,
    set_up,
    shard_of,
    train,
    whole,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TABLE: Final = Table("strategy", inside=False)


@TABLE.rule(
    "STR-301",
    "Training on the parts of each batch ends where one process ends on whole batches.",
    reason="It is what a strategy is for: more processes, the same training.",
    advice="average gradients over the ranks, each once, before the optimizer steps",
    world_sizes=ALWAYS,
    examples=cases.trainings(),
    count=8,
)
def _trains(bench: Bench, case: Training) -> None:
    check_training(bench, case, How())


@TABLE.rule(
    "STR-302",
    "After a training every rank has the same parameters, to the last bit.",
    reason="Ranks that drift apart train different models, and only one of them is saved.",
    advice="let every rank step with the same gradients, in the same order of sums",
    world_sizes=SEVERAL,
    examples=cases.trainings(optimizer="adam"),
    count=3,
)
def _ranks_agree(bench: Bench, case: Training) -> None:
    first, *others = bench.run(train, case, How())
    for rank, other in enumerate(others, 1):
        if distance(first, other) != 0:
            raise Broken(f"rank {rank} differs from rank 0 by {distance(first, other):.3g}")


@TABLE.rule(
    "STR-303",
    "Ranks whose models start unequal train rank 0's.",
    reason="A script that forgot to seed must not average unlike models.",
    advice="send rank 0's parameters and buffers to all ranks in setup_module",
    world_sizes=SEVERAL,
    examples=cases.trainings(),
    count=2,
    first=(Training(buffers=True),),
)
def _equal_start(bench: Bench, case: Training) -> None:
    check_training(bench, case, How(unequal_start=True))


def _accumulations() -> "SearchStrategy[Training]":
    from hypothesis import strategies as st

    return cases.trainings(accumulate=st.integers(2, 3), steps=st.integers(1, 2))()


@TABLE.rule(
    "STR-304",
    "Several backward passes before a step add up to the big batch.",
    reason="Accumulation must not depend on how gradients travel.",
    advice="average what a pass adds, not what was averaged before",
    world_sizes=ALWAYS,
    examples=_accumulations,
    count=4,
)
def _accumulates(bench: Bench, case: Training) -> None:
    check_training(bench, case, How())


@TABLE.rule(
    "STR-305",
    "Several backward passes, all but the last inside `no_backward_sync`, add up to the big batch.",
    reason="It is how scripts save communication; the result is the same.",
    advice="average everything that was gathered in the pass that synchronises",
    world_sizes=ALWAYS,
    examples=_accumulations,
    count=4,
)
def _accumulates_apart(bench: Bench, case: Training) -> None:
    check_training(bench, case, How(apart=True))


@TABLE.rule(
    "STR-306",
    "Inside `no_backward_sync` gradients are not synchronized: each rank has its own, or keeps them until the end.",
    reason="Who declares it promises that nothing travels; a script counts on the time saved.",
    advice="leave gradients alone inside the context, or take no_backward_sync out of the capabilities",
    needs=("no_backward_sync", "synchronous"),
    world_sizes=SEVERAL,
)
def _stays_apart(bench: Bench) -> None:
    for rank, (got, own, mean) in enumerate(bench.run(one_pass, "apart")):
        if all(value is None for value in got.values()):
            continue
        if gap(got, mean) <= exact() or (not bench.declared["sharded"] and not gap(got, own) <= exact()):
            raise Broken(f"rank {rank}'s gradients are off its own by {gap(got, own):.3g}, off the mean by "
                         f"{gap(got, mean):.3g}")  # fmt: skip


@TABLE.rule(
    "STR-307",
    "Without the capability, `no_backward_sync` changes nothing: gradients are the mean.",
    reason="A strategy that can't skip synchronization must not half do it; what works must be declared.",
    advice="declare no_backward_sync, or leave the context as the contract has it",
    lacks=("no_backward_sync",),
    needs=("distributed",),
    world_sizes=SEVERAL,
)
def _synchronises_always(bench: Bench) -> None:
    for rank, (got, own, mean) in enumerate(bench.run(one_pass, "undeclared")):
        if not gap(got, mean) <= exact():
            raise Broken(f"rank {rank}'s gradients are off the mean by {gap(got, mean):.3g}, "
                         f"off its own by {gap(got, own):.3g}")  # fmt: skip


@TABLE.rule(
    "STR-308",
    "`no_backward_sync(enabled=False)` changes nothing: gradients are the mean.",
    reason="Scripts pass a condition.",
    advice="look at enabled",
    world_sizes=SEVERAL,
)
def _not_enabled(bench: Bench) -> None:
    check_mean(bench, "disabled")


@TABLE.rule(
    "STR-309",
    "An exception inside `no_backward_sync` ends it: the next pass is averaged.",
    reason="A script that catches the error and goes on must not train with unsynchronized gradients.",
    advice="undo in `finally`",
    world_sizes=SEVERAL,
)
def _ends_on_errors(bench: Bench) -> None:
    check_mean(bench, "raises")


def _ways(*, sharded: bool) -> list[torch.Tensor]:
    """Say for some batches which rows go right: none, some, all, the others.

    One rank's rows all go one way where some do. Who shards is spared that: its ranks gather parameters together.
    """
    rows = torch.arange(cases.PARTS)
    some = rows % 2 == 0 if sharded else rows < cases.PARTS // 2
    return [torch.zeros_like(some), some, torch.ones_like(some), ~some]


def _branches(place: Place) -> list[Weights | str]:
    """Train a model in which a pass may leave a layer out, on one rank or on all."""
    with place.fabric() as fabric:
        model = zoo.Branching()
        wrapped, stepper = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        ways = _ways(sharded=fabric.strategy.capabilities.sharded)
        shard = shard_of(fabric)
        try:
            for right, batch in zip(ways, cases.batches(Training(), steps=len(ways)), strict=True):
                x, y, mine = (part(one, shard).to(fabric.device) for one in (*batch, right))
                fabric.backward(nn.functional.mse_loss(wrapped(x, mine), y))
                stepper.step()
                stepper.zero_grad()
        except RuntimeError as error:
            return [str(error)]
        return [whole(fabric, model)]


def _branched_alone(*, sharded: bool) -> Weights:
    model = zoo.Branching()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ways = _ways(sharded=sharded)
    for right, (x, y) in zip(ways, cases.batches(Training(), steps=len(ways)), strict=True):
        nn.functional.mse_loss(model(x, right), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return cases.copied(model)


@TABLE.rule(
    "STR-310",
    "Where a pass leaves a parameter out, on one rank or on all: all trains as with one process, or every rank raises.",
    reason="Models with branches take different ones on different ranks; gradients must not drift apart silently.",
    advice="treat a gradient that a rank lacks as zero where another has one, or raise on every rank",
    world_sizes=ALWAYS,
)
def _unused(bench: Bench) -> None:
    expected = _branched_alone(sharded=bench.declared["sharded"])
    results = [got for (got,) in bench.run(_branches)]
    raised = [rank for rank, got in enumerate(results) if isinstance(got, str)]
    if len(raised) == len(results):
        return
    for rank, got in enumerate(results):
        if isinstance(got, str):
            raise Broken(f"rank {rank} raised, and others did not: {got}")
        if not distance(got, expected) <= exact():
            raise Broken(f"rank {rank}'s parameters differ by {distance(got, expected):.3g}")


def _twice(place: Place) -> float:
    case = Training(optimizer="sgd")
    with place.fabric() as fabric:
        model, wrapped, _ = set_up(fabric, case, How())
        (x, y), _ = cases.batches(case)
        loss = loss_of(fabric, wrapped, How(), case, x, y)
        with fabric.no_backward_sync(wrapped):
            fabric.backward(loss, retain_graph=True)
            retained = loss.grad_fn is not None
            first = local(model)
            fabric.backward(loss, gradient=torch.full_like(loss, 2.0))
            second = local(model)
    if not retained or any(value is None for value in (*first.values(), *second.values())):
        return 0.0
    tripled = {name: 3 * value for name, value in first.items()}
    return distance(tripled, second)


@TABLE.rule(
    "STR-331",
    "`backward` passes its arguments on: a retained graph runs again, with the gradient that is given.",
    reason="Scripts use retain_graph and gradient as with torch.Tensor.backward.",
    advice="call loss.backward(**arguments)",
    world_sizes=(1,),
)
def _backward_arguments(bench: Bench) -> None:
    off = bench.run(_twice)[0]
    if not off <= exact():
        raise Broken(f"after a second pass with gradient=2 the gradients are off by {off:.3g}")


@TABLE.rule(
    "STR-332",
    "Who doesn't declare requires_strategy_backward: after `loss.backward()` the gradients are the mean too.",
    reason="Undeclared, nothing refuses such a call.",
    advice="declare requires_strategy_backward, or average in hooks of autograd",
    lacks=("requires_strategy_backward",),
    world_sizes=ALWAYS,
)
def _needs_no_backward(bench: Bench) -> None:
    check_mean(bench, "raw")


@TABLE.rule(
    "STR-333",
    "Who declares requires_strategy_backward needs it: after a raw backward pass the gradients are not the mean.",
    reason="What works must be declared: a script's `loss.backward()` is refused because of it.",
    advice="take requires_strategy_backward out of the capabilities",
    needs=("requires_strategy_backward", "synchronous"),
    world_sizes=ALWAYS,
)
def _requires_strategy_backward(bench: Bench) -> None:
    if bench.world_size < (bench.declared["max_world_size"] or SEVERAL[0]):
        return
    if all(gap(got, mean) <= exact() for got, _, mean in bench.run(one_pass, "inner")):
        raise Broken("they are")
