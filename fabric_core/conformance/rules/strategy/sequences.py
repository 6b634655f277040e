"""Rules for strategies: longer sequences of calls, other places in the world, and who must wait how long."""

import copy
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training, Weights, distance
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import (
    ALWAYS,
    SEVERAL,
    How,
    full,
    gap,
    gradients,
    local,
    loss_of,
    set_up,
    shard_of,
    train,
    whole,
)
from fabric_core.contracts import PrecisionPolicy, World
from fabric_core.wrapping import unwrap

TABLE: Final = Table("strategy", inside=False)

_PATIENCE: Final = 2.0
"""How many seconds a collective waits for the other ranks, where the world says so."""
_AWAY: Final = timedelta(seconds=6)
"""How long a rank stays away at most, which is longer than they wait."""


def _nest(place: Place) -> tuple[Weights, float]:
    """Accumulate inside contexts that nest, the inner ones enabled and not, and step after the outermost ended.

    Gives the parameters, and how far gradients were off this rank's own just before the outermost ended.
    """
    case = Training(steps=4, optimizer="decay")
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = set_up(fabric, case, How())
        first, second, third, last = cases.batches(case)

        def run(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
            fabric.backward(loss_of(fabric, wrapped, How(), case, *batch) / 4)

        with fabric.no_backward_sync(wrapped):
            with fabric.no_backward_sync(wrapped):
                run(first)
            with fabric.no_backward_sync(wrapped, enabled=False):
                run(second)
            run(third)
            gathered = local(model)
        shard = shard_of(fabric)
        own = cases.build(case)
        for x, y in (first, second, third):
            (nn.functional.mse_loss(own(cases.part(x, shard)), cases.part(y, shard)) / 4).backward()
        kept_back = all(one is None for one in gathered.values())
        off = 0.0 if kept_back or fabric.strategy.capabilities.sharded else gap(gathered, gradients(own))
        run(last)
        stepper.step()
        return whole(fabric, model), off


@TABLE.rule(
    "STR-365",
    "`no_backward_sync` nests: what is gathered inside the outermost is synchronized once, by the pass after it.",
    reason="A helper that accumulates is called by one that does.",
    advice="remember what was before, and restore it; an inner context ends nothing",
    world_sizes=ALWAYS,
)
def _nests(bench: Bench) -> None:
    case = Training(steps=4, optimizer="decay")
    model = cases.build(case)
    optimizer = cases.optimizer_for(case, model.parameters())
    for x, y in cases.batches(case):
        (nn.functional.mse_loss(model(x), y) / 4).backward()
    optimizer.step()
    for rank, (got, off) in enumerate(bench.run(_nest)):
        if bench.declared["no_backward_sync"] and not off <= exact():
            raise Broken(
                f"after inner contexts ended, rank {rank}'s gradients in the outer are off its own by {off:.3g}"
            )
        if not distance(got, cases.copied(model)) <= exact():
            raise Broken(f"rank {rank}'s parameters differ by {distance(got, cases.copied(model)):.3g}")


def _load_over(place: Place) -> tuple[Weights, list[dict[str, Any]], bool]:
    """Load an optimizer's state into one that has stepped and has other settings, and step."""
    case = Training(steps=3, optimizer="adam")
    first, second, last = cases.batches(case)
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = set_up(fabric, case, How())

        def step(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
            fabric.backward(loss_of(fabric, wrapped, How(), case, *batch))
            stepper.step()
            stepper.zero_grad()

        strategy, own = fabric.strategy, unwrap(stepper)
        step(first)
        saved = [strategy.module_state(model, True), strategy.optimizer_state(own, True)]
        saved = fabric.broadcast(copy.deepcopy(saved))
        step(second)
        for group in own.param_groups:
            group.update(lr=0.5, weight_decay=0.9)
        given = copy.deepcopy(saved)
        strategy.load_module_state(model, given[0], True, True)
        strategy.load_optimizer_state(own, given[1], True)
        kept = _alike(given, saved)
        step(last)
        settings = [{name: group[name] for name in ("lr", "weight_decay", "betas")} for group in own.param_groups]
        return whole(fabric, model), settings, kept


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and type(one) is type(other) and torch.equal(full(one), full(other))
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(_alike(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def _loaded_alone() -> tuple[Weights, list[dict[str, Any]]]:
    case = Training(steps=3, optimizer="adam")
    model = cases.build(case)
    optimizer = cases.optimizer_for(case, model.parameters())
    first, _, last = cases.batches(case)
    for x, y in (first, last):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    names = ("lr", "weight_decay", "betas")
    return cases.copied(model), [{name: group[name] for name in names} for group in optimizer.param_groups]


@TABLE.rule(
    "STR-381",
    "Loading into an optimizer that has stepped, and has other settings, replaces both by the saved ones.",
    reason="A training that goes back to its best checkpoint must not go on with what it gathered since.",
    advice="take the groups' settings and all state from what is loaded, as torch.optim.Optimizer.load_state_dict does",
    world_sizes=ALWAYS,
)
def _replaces(bench: Bench) -> None:
    expected, settings = _loaded_alone()
    for rank, (got, seen, _) in enumerate(bench.run(_load_over)):
        if seen != settings:
            raise Broken(f"rank {rank}'s groups have {seen}, and {settings} was saved")
        if not distance(got, expected) <= exact():
            raise Broken(f"rank {rank}'s parameters differ by {distance(got, expected):.3g} after the next step")


@TABLE.rule(
    "STR-382",
    "Loading leaves the state that is given as it was.",
    reason="One state is loaded into several models, and compared afterwards.",
    advice="copy what is changed",
    world_sizes=ALWAYS,
)
def _keeps_given(bench: Bench) -> None:
    for rank, (_, _, kept) in enumerate(bench.run(_load_over)):
        if not kept:
            raise Broken(f"rank {rank}: the state that was given is another after loading")


def _clip_one(place: Place) -> tuple[float, dict[str, torch.Tensor]]:
    """Clip what one of two optimizers holds; give the norm and the gradients of all."""
    case = Training()
    with place.fabric() as fabric:
        model, wrapped, steppers = set_up(fabric, case, How(several_optimizers=True))
        fabric.backward(loss_of(fabric, wrapped, How(), case, *next(cases.batches(case))))
        norm = fabric.clip_gradients(wrapped, steppers[0], max_norm=0.01)
        # Whatever is averaged as late as a step or a clipping is, by now.
        fabric.clip_gradients(wrapped, steppers[1], max_norm=1e9)
        known = float("nan") if norm is None else float(norm)
        return known, {name: full(one.grad) for name, one in model.named_parameters() if one.grad is not None}


@TABLE.rule(
    "STR-345",
    "Clipping what one of several optimizers holds gives the norm of that, and leaves the other gradients alone.",
    reason="Each part of a model has its own threshold.",
    advice="look at the parameters that are given, and no others",
    needs=("multiple_optimizers",),
    world_sizes=ALWAYS,
)
def _clips_some(bench: Bench) -> None:
    case = Training()
    plain = cases.build(case)
    x, y = next(cases.batches(case))
    nn.functional.mse_loss(plain(x), y).backward()
    mine = cases.optimizers_for(case, plain.parameters())[0].param_groups[0]["params"]
    expected = nn.utils.clip_grad_norm_(mine, 0.01).item()
    unclipped = {name: one.grad for name, one in plain.named_parameters() if one.grad is not None}
    for rank, (norm, got) in enumerate(bench.run(_clip_one)):
        if not abs(norm - expected) <= exact():
            raise Broken(f"rank {rank}: the norm is {norm:.6g}, and that of what was given {expected:.6g}")
        if not distance(got, unclipped) <= exact():
            raise Broken(f"rank {rank}: gradients are off by {distance(got, unclipped):.3g}")


@contextmanager
def _on_a_node_of_its_own(place: Place) -> Iterator[None]:
    """Let this rank be the only one of its node."""
    ours = {"GROUP_RANK": str(place.rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    before = {name: os.environ[name] for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        os.environ.update(before)


def _on_own_nodes(place: Place) -> tuple[Weights, str, list[float]]:
    with _on_a_node_of_its_own(place):
        trained = train(place, Training(), How(unequal_start=True), nodes=place.world_size)
        with place.fabric(nodes=place.world_size) as fabric:
            said = fabric.strategy.broadcast(f"rank {place.rank}", 1)
            seen = fabric.strategy.all_gather(torch.tensor([float(place.rank)], device=fabric.device), None, False)
            return trained, said, [one.item() for one in seen]


@TABLE.rule(
    "STR-364",
    "Ranks on nodes of their own, whose local rank is 0, train and speak as ranks of one node do.",
    reason="On several machines local and global ranks differ; whoever takes one for the other writes twice.",
    advice="number by global_rank and world_size; a local rank names a device, and nothing else",
    needs=("distributed",),
    world_sizes=SEVERAL,
)
def _nodes(bench: Bench) -> None:
    expected = cases.trained_alone(Training())
    for rank, (trained, said, seen) in enumerate(bench.run_apart(_on_own_nodes)):
        if not distance(trained, expected) <= exact():
            raise Broken(f"rank {rank}'s parameters differ by {distance(trained, expected):.3g}")
        if said != "rank 1" or seen != [float(one) for one in range(bench.world_size)]:
            raise Broken(f"rank {rank} hears {said!r} from rank 1, and gathers {seen}")


def _stay_away(place: Place) -> float:
    """Wait for a rank that doesn't come; give the seconds until that was an error, or -1 where it was none."""
    gave_up, others = place.store(), range(place.world_size - 1)
    strategy = place.plugin()
    world = World(
        global_rank=place.rank,
        local_rank=place.rank,
        world_size=place.world_size,
        local_world_size=place.world_size,
        device=torch.device("cpu"),
        backend="gloo",
        open_store=place.store,
        timeout=timedelta(seconds=_PATIENCE),
    )
    collectives = strategy.connect(world, PrecisionPolicy())
    try:
        collectives.barrier(None)
        begin = time.monotonic()
        if place.rank == place.world_size - 1:
            with suppress(RuntimeError):  # they wait on
                gave_up.wait([f"gave up {rank}" for rank in others], _AWAY)
            return 0.0
        try:
            collectives.all_reduce(torch.ones(1), None, "sum")
        except Exception:  # noqa: BLE001 - backends have errors of their own
            gave_up.set(f"gave up {place.rank}", "")
            return time.monotonic() - begin
        return -1.0
    finally:
        strategy.teardown()
        world.closing.close()


@TABLE.rule(
    "STR-367",
    "A collective waits no longer for the other ranks than the world's timeout says, and then raises.",
    reason="A job in which one rank is gone costs as much as one that trains.",
    advice="hand world.timeout on to the process group",
    needs=("distributed",),
    world_sizes=SEVERAL,
)
def _times_out(bench: Bench) -> None:
    if bench.device_type != "cpu":
        return
    for rank, seconds in enumerate(bench.run_apart(_stay_away)[:-1]):
        if not 0 <= seconds < _AWAY.total_seconds() - 1:
            came = "never" if seconds < 0 else f"after {seconds:.1f} s"
            raise Broken(f"rank {rank} was told to wait {_PATIENCE:.0f} s, and the error came {came}")


def _outlive(place: Place) -> Weights:
    """Train under one Fabric, while another one comes and goes in the same process."""
    case = Training(steps=3)
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = set_up(fabric, case, How())
        for index, (x, y) in enumerate(cases.batches(case)):
            if index == 1:
                train(place, Training(seed=9, steps=1), How())
            fabric.backward(loss_of(fabric, wrapped, How(), case, x, y))
            stepper.step()
            stepper.zero_grad()
        return whole(fabric, model)


@TABLE.rule(
    "STR-398",
    "Of two that live in one process, one trains on after the other was torn down.",
    reason="A script evaluates with a second Fabric, and goes on.",
    advice="release in teardown what this one acquired, and nothing that others use",
    world_sizes=ALWAYS,
)
def _outlives(bench: Bench) -> None:
    expected = cases.trained_alone(Training(steps=3))
    for rank, got in enumerate(bench.run(_outlive)):
        if not distance(got, expected) <= exact():
            raise Broken(f"rank {rank}'s parameters differ by {distance(got, expected):.3g}")
