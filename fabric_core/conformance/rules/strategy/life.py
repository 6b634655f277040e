"""Rules for strategies: connecting, tearing down, and failing."""

import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import nn

from fabric_core.conformance import cases, snapshot
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training, distance
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import (
    ALWAYS,
    SEVERAL,
    How,
    gap,
    gradients,
    loss_of,
    plain_gradients,
    set_up,
    train,
)

TABLE: Final = Table("strategy", inside=False)


def _tear(place: Place, how: str) -> None:
    if how == "unconnected":
        place.plugin().teardown()
        return
    with place.fabric() as fabric:
        fabric.strategy.barrier(None)
        fabric.strategy.teardown()
        fabric.strategy.teardown()


@TABLE.rule(
    "STR-390",
    "`teardown` may be called without `connect`.",
    reason="What failed half-way is torn down too; an error then would hide the cause.",
    advice="let teardown look at what there is to release",
)
def _unconnected(bench: Bench) -> None:
    bench.run(_tear, "unconnected")


@TABLE.rule(
    "STR-391",
    "`teardown` may be called twice.",
    reason="A with block and a handler may both do it.",
    advice="forget what was released",
    world_sizes=ALWAYS,
)
def _torn_twice(bench: Bench) -> None:
    bench.run(_tear, "twice")


def _leak(place: Place) -> list[str]:
    case, before = Training(), snapshot.take()
    x, y = next(cases.batches(case))
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = set_up(fabric, case, How())
        fabric.backward(loss_of(fabric, wrapped, How(), case, x, y))
        stepper.step()
        sharded, device = fabric.strategy.capabilities.sharded, fabric.device
    left = snapshot.differences(before)
    if not sharded:
        own = plain_gradients(case, x, y, cases.copied(model))
        model.zero_grad()
        nn.functional.mse_loss(model(x.to(device)), y.to(device)).backward()
        if not gap(gradients(model), own) <= exact():
            left.append("what the model's own backward pass gives")
    kept = weakref.ref(model)
    del fabric, model, wrapped, stepper
    gc.collect()
    return left if kept() is None else [*left, "the model's life, which doesn't end,"]


@TABLE.rule(
    "STR-392",
    "After `teardown` nothing is left: no process group, hook, thread or environment variable, no setting, random"
    " number or function changed, and no model kept.",
    reason="Another Fabric, or a plain script, goes on in the same process.",
    advice="undo in teardown what connect and setup did; take hooks off parameters, and forget modules",
    world_sizes=ALWAYS,
)
def _leaves_nothing(bench: Bench) -> None:
    for rank, left in enumerate(bench.run_apart(_leak)):
        if left:
            raise Broken(f"rank {rank} leaves {', '.join(left)} changed")


def _again(place: Place) -> float:
    results = [train(place, Training(), How()) for _ in range(2)]
    return distance(*results)


@TABLE.rule(
    "STR-393",
    "After a teardown the next Fabric of the process works as the first did.",
    reason="Notebooks, sweeps and tests make many.",
    advice="keep no state on the class, and release everything",
    world_sizes=ALWAYS,
)
def _works_again(bench: Bench) -> None:
    off = max(bench.run(_again))
    if off != 0:
        raise Broken(f"the second training differs by {off:.3g}")


@contextmanager
def _scripts_group(place: Place) -> Iterator[None]:
    """Let the script have a process group, of its own making."""
    import torch.distributed as dist

    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    own = dist.PrefixStore("the user's", store)
    dist.init_process_group("gloo", store=own, rank=place.rank, world_size=place.world_size)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _others_group(place: Place) -> tuple[bool, float]:
    import torch.distributed as dist

    with _scripts_group(place):
        train(place, Training(steps=1), How())
        alive = dist.is_initialized()
        total = torch.ones(1)
        if alive:
            dist.all_reduce(total)
        return alive, total.item()


@TABLE.rule(
    "STR-394",
    "A process group that was there before is there after.",
    reason="What a script made it releases itself.",
    advice="destroy only what connect made",
    needs=("distributed",),
    world_sizes=ALWAYS,
)
def _leaves_others(bench: Bench) -> None:
    for rank, (alive, total) in enumerate(bench.run(_others_group)):
        if not alive or total != bench.world_size:
            raise Broken(f"rank {rank}: the group is {'gone' if not alive else 'broken'}")


def _called_after(place: Place) -> str:
    """Call what a Fabric's ranks spoke through once it has ended, beside a process group that goes on."""
    with _scripts_group(place):
        with place.fabric() as fabric:
            collectives = fabric.strategy.collectives
            collectives.barrier(None)
        try:
            collectives.all_reduce(torch.ones(1), None, "sum")
        except Exception as error:  # noqa: BLE001 - backends have errors of their own, and any is no silence
            return type(error).__name__
        return "none"


@TABLE.rule(
    "STR-401",
    "Collectives that were closed refuse to be called, also where another process group goes on.",
    reason="What is sent through somebody else's group meets other messages, and hangs or mixes them.",
    advice="forget the group in close, and raise where there is none",
    needs=("distributed",),
    world_sizes=SEVERAL,
)
def _closed(bench: Bench) -> None:
    for rank, error in enumerate(bench.run(_called_after)):
        if error == "none":
            raise Broken(f"rank {rank} reduced after the teardown")


def _one_fails(place: Place, which: int) -> str:
    """One rank raises in the middle of a training; the others must not wait for ever."""
    try:
        _leave_early(place, which)
    except Exception as error:  # noqa: BLE001 - any will do: the rank came to an end
        outcome = type(error).__name__
    else:
        outcome = "went on"
    # A rank that ends releases what its model holds; this one stays up for the next measurement.
    gc.collect()
    return outcome


def _leave_early(place: Place, which: int) -> None:
    case = Training()
    with place.fabric() as fabric:
        _, wrapped, (stepper,) = set_up(fabric, case, How())
        for index, (x, y) in enumerate(cases.batches(case, steps=4)):
            if index == 1 and place.rank == which:
                raise ZeroDivisionError
            fabric.backward(loss_of(fabric, wrapped, How(), case, x, y))
            stepper.step()
            stepper.zero_grad()
        fabric.barrier()


@TABLE.rule(
    "STR-395",
    "Where one rank raises and leaves, the others raise too, instead of waiting.",
    reason="A hanging job costs as much as a training one.",
    advice="let the process group end with the rank: destroy it in teardown",
    needs=("distributed",),
    world_sizes=SEVERAL,
)
def _errors_surface(bench: Bench) -> None:
    for which in reversed(range(bench.world_size)):
        for rank, outcome in enumerate(bench.run(_one_fails, which)):
            if outcome == "went on":
                raise Broken(f"rank {which} raised, and rank {rank} went on as if nothing had happened")
