"""Rules for strategies that let ranks part between steps, and synchronize them from time to time."""

import tempfile
from pathlib import Path
from typing import Any, Final

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training, Weights, distance, part
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import SEVERAL, How, loss_of, set_up, whole

TABLE: Final = Table("strategy", inside=False)

_CASE: Final = Training(steps=16, optimizer="adam")


def _train(place: Place, first: int, last: int, folder: str) -> list[Weights]:
    """Train each rank on its own part of the data; give its parameters after each step.

    What begins after the first step loads what an earlier call saved, and what ends before the last one saves.
    """
    path, seen = Path(folder) / "state.pt", []
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = set_up(fabric, _CASE, How())
        state: dict[str, Any] = {"model": wrapped, "optimizer": stepper}
        if first:
            fabric.load(path, state)
        for x, y in list(cases.batches(_CASE))[first:last]:
            mine = (part(one, (place.rank, place.world_size)) for one in (x, y))
            fabric.backward(loss_of(fabric, wrapped, How(), _CASE, *mine))
            stepper.step()
            stepper.zero_grad()
            seen.append(whole(fabric, model))
        if last < _CASE.steps:
            fabric.save(path, state)
    return seen


def _meetings(bench: Bench, first: int, last: int, folder: str = "") -> tuple[list[bool], list[Weights]]:
    """Say after which steps all ranks have the same parameters, and give rank 0's after each."""
    mine, *others = bench.run(_train, first, last, folder)
    return [all(distance(one, other[index]) <= exact() for other in others) for index, one in enumerate(mine)], mine


@TABLE.rule(
    "STR-346",
    "Who doesn't declare synchronous has a reason: on parts of the data it ends elsewhere than one process on all.",
    reason="What works must be declared: the guards of synchronous training stand down because of it.",
    advice="declare synchronous, or choose options for the kit under which ranks part",
    needs=("distributed",),
    lacks=("synchronous",),
    world_sizes=SEVERAL,
)
def _parts(bench: Bench) -> None:
    _, mine = _meetings(bench, 0, _CASE.steps)
    if distance(mine[-1], cases.trained_alone(_CASE)) <= exact():
        raise Broken(f"after {_CASE.steps} steps of Adam every rank is where one process is")


@TABLE.rule(
    "STR-347",
    f"Who doesn't declare synchronous synchronizes its ranks within {_CASE.steps} steps: after one all have the same"
    " parameters.",
    reason="Ranks that never meet train models of their own, and only one of them is saved.",
    advice="average parameters every few steps; with many steps between, choose options for the kit with fewer",
    needs=("distributed",),
    lacks=("synchronous",),
    world_sizes=SEVERAL,
)
def _meets(bench: Bench) -> None:
    together, _ = _meetings(bench, 0, _CASE.steps)
    if not any(together):
        raise Broken("the ranks differ after every step")


@TABLE.rule(
    "STR-348",
    "Who doesn't declare synchronous: the steps after which ranks meet stay the same ones where a checkpoint lies"
    " between.",
    reason="A job that is preempted often would otherwise never come to the step at which ranks meet.",
    advice="give the counter of steps in state_dict, and take it back in load_state_dict",
    needs=("distributed",),
    lacks=("synchronous",),
    world_sizes=SEVERAL,
)
def _counts_on(bench: Bench) -> None:
    together, _ = _meetings(bench, 0, _CASE.steps)
    between = max(1, together.index(True)) if any(together) else 1  # just before they meet
    with tempfile.TemporaryDirectory(prefix="fabric-kit-") as folder:
        before, _ = _meetings(bench, 0, between, folder)
        after, _ = _meetings(bench, between, _CASE.steps, folder)
    if before + after != together:
        met, again = ([step for step, one in enumerate(each, 1) if one] for each in (together, before + after))
        raise Broken(f"they meet after the steps {met}; with a checkpoint after step {between} after {again}")
