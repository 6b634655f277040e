"""Rules for strategies: the precision's types."""

import contextlib
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training, Weights
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import (
    ALWAYS,
    How,
    check_training,
    gap,
    one_pass,
    set_up_module,
    train,
)

TABLE: Final = Table("strategy", inside=False)


def _scaled(place: Place, case: Training) -> Weights:
    from fabric_core.conformance.references import Scaled

    return train(place, case, How(), precision=Scaled())


@TABLE.rule(
    "STR-385",
    "With a scaled loss it trains as without.",
    reason="It is declared, and 16-bit training needs it.",
    advice="leave the loss and the gradients' scale alone, or take loss_scaling out of the capabilities",
    needs=("loss_scaling",),
    lacks=("sharded",),
    world_sizes=ALWAYS,
    examples=cases.trainings(),
    count=2,
)
def _with_scaling(bench: Bench, case: Training) -> None:
    check_training(bench, case, How(), _scaled)


@TABLE.rule(
    "STR-389",
    "Who doesn't declare loss_scaling has a reason: a scaled loss gives other gradients than the scaled ones.",
    reason="What works must be declared: 16-bit training is refused because of it.",
    advice="declare loss_scaling",
    lacks=("loss_scaling", "sharded"),
    world_sizes=ALWAYS,
)
def _without_scaling(bench: Bench) -> None:
    if all(gap(got, mean) <= exact() for got, _, mean in bench.run(one_pass, "scaled")):
        raise Broken("they are")


def _types(place: Place, which: str) -> tuple[Any, Any]:
    from fabric_core.conformance import references

    with place.fabric(precision=references.Mixed() if which == "mixed" else references.Full()) as fabric:
        model = cases.build(Training(), torch.float32)
        wrapped = set_up_module(fabric, model)
        x, _ = next(cases.batches(Training(), torch.float32))
        y = wrapped(x.to(fabric.device))
        return model.seen[0], y.dtype


@TABLE.rule(
    "STR-386",
    "A precision's compute type holds inside the model, and its output type outside.",
    reason="Any precision works with any strategy, by its policy alone.",
    advice="carry out the policy, or leave applies_mixed_precision undeclared, and the core does it",
    world_sizes=ALWAYS,
)
def _carries(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_types, "mixed")):
        if seen != (torch.bfloat16, torch.float32):
            raise Broken(f"rank {rank}: {seen[0]} inside and {seen[1]} outside, for bfloat16 and float32")


@TABLE.rule(
    "STR-387",
    "Where the precision asks for nothing, no type changes.",
    reason="Types are the precision's business.",
    advice="convert nothing that the policy doesn't name",
    world_sizes=ALWAYS,
)
def _changes_no_type(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_types, "full")):
        if seen != (torch.float32, torch.float32):
            raise Broken(f"rank {rank}: {seen[0]} inside and {seen[1]} outside, for float32")


def _initialise(place: Place, empty: bool) -> tuple[list[Any], bool, bool]:
    with place.fabric() as fabric:
        before = torch.get_default_device()
        with fabric.strategy.init_module(empty):
            model = nn.Linear(3, 2)
        same = torch.get_default_device() == before
        with contextlib.suppress(ZeroDivisionError), fabric.strategy.init_module(empty):
            raise ZeroDivisionError
        return [tuple(one.shape) for one in model.parameters()], same, torch.get_default_device() == before


@TABLE.rule(
    "STR-388",
    "`init_module` changes where a model is made, not what it is, and ends with its block.",
    reason="A script makes other tensors after it.",
    advice="give a context that undoes what it does",
    world_sizes=ALWAYS,
)
def _init(bench: Bench) -> None:
    for empty in (False, True):
        for rank, (shapes, after, raised) in enumerate(bench.run(_initialise, empty)):
            if shapes != [(2, 3), (2,)] or not after or not raised:
                raise Broken(f"rank {rank}, empty={empty}: shapes {shapes}, default device back: {after and raised}")
