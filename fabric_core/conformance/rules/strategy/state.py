"""Rules for strategies: state, and what is loaded."""

import pickle
import tempfile
from dataclasses import replace
from pathlib import Path
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
    local_part,
    loss_of,
    set_up,
    whole,
)

TABLE: Final = Table("strategy", inside=False)


def _states(place: Place, case: Training) -> dict[str, Any]:
    """Train, and give the consolidated state."""
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = set_up(fabric, case, How())
        for x, y in cases.batches(case):
            fabric.backward(loss_of(fabric, wrapped, How(), case, x, y))
            stepper.step()
            stepper.zero_grad()
        state = fabric.strategy.module_state(model, True)
        optimizer = fabric.strategy.optimizer_state(stepper.optimizer, True)
        plain = all(type(one) in {torch.Tensor, nn.Parameter} and one.device.type == "cpu" for one in state.values())
        return {
            "keys": list(state),
            "plain": plain,
            "state": {name: full(one) for name, one in state.items()} if plain else {},
            "optimizer": pickle.dumps(optimizer),
            "whole": whole(fabric, model),
        }


@TABLE.rule(
    "STR-370",
    "The consolidated state has the bare module's keys, in whole tensors with the trained values, on rank 0.",
    reason="A checkpoint is loaded by plain PyTorch, and under other strategies.",
    advice="gather, and take every prefix off the names",
    world_sizes=ALWAYS,
    examples=cases.trainings(optimizer="adam"),
    count=3,
)
def _consolidated(bench: Bench, case: Training) -> None:
    seen = bench.run(_states, case)[0]
    expected = list(cases.build(case).state_dict())
    if sorted(seen["keys"]) != sorted(expected):
        raise Broken(f"the keys are {seen['keys']}, and the module's {expected}")
    if seen["plain"] and distance(seen["state"], seen["whole"]) != 0:
        raise Broken("the values, or the shapes, aren't the model's")


@TABLE.rule(
    "STR-371",
    "The consolidated state's tensors are plain tensors on the CPU.",
    reason="A file of distributed tensors needs as many processes to be read.",
    advice="call .full_tensor().cpu()",
    world_sizes=ALWAYS,
)
def _plain_state(bench: Bench) -> None:
    if not bench.run(_states, Training())[0]["plain"]:
        raise Broken("some are distributed, or lie on a device")


@TABLE.rule(
    "STR-372",
    "The consolidated state of model and optimizer goes on training in plain PyTorch as if nothing had happened.",
    reason="The format is torch's, so that a user is never locked in.",
    advice="give the optimizer's state in the form of torch.optim.Optimizer.state_dict, with whole tensors",
    world_sizes=ALWAYS,
    examples=cases.trainings(optimizer="adam", tied=False),
    count=3,
)
def _goes_on_in_plain_pytorch(bench: Bench, case: Training) -> None:
    seen = bench.run(_states, case)[0]
    model = cases.build(replace(case, seed=case.seed + 1))
    optimizer = cases.optimizer_for(case, model.parameters())
    model.load_state_dict(seen["state"])
    optimizer.load_state_dict(pickle.loads(seen["optimizer"]))  # noqa: S301 - from our own rank
    longer = replace(case, steps=case.steps + 1)
    x, y = list(cases.batches(longer))[-1]
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    off = distance(cases.copied(model), cases.trained_alone(longer))
    if not off <= exact():
        raise Broken(f"after one more step the parameters differ by {off:.3g}")


def _resume(place: Place, case: Training, folder: str) -> Weights:
    """Train the first half, save, and continue in a new Fabric with another model."""
    path = Path(folder) / "state.pt"
    half = max(1, case.steps // 2)
    every = list(cases.batches(case))
    for first in (True, False):
        with place.fabric() as fabric:
            start = case if first else replace(case, seed=case.seed + 1)
            model, wrapped, (stepper,) = set_up(fabric, start, How())
            state = {"model": wrapped, "optimizer": stepper, "epoch": 7}
            if not first:
                fabric.load(path, state)
                if state["epoch"] != 7:
                    raise Broken("a plain value did not come back")
            for x, y in every[:half] if first else every[half:]:
                fabric.backward(loss_of(fabric, wrapped, How(), case, x, y))
                stepper.step()
                stepper.zero_grad()
            if first:
                fabric.save(path, state)
            result = whole(fabric, model)
    return result


@TABLE.rule(
    "STR-373",
    "A training that is saved, loaded into a new model and continued ends where an uninterrupted one does.",
    reason="Jobs are preempted.",
    advice="give and take all of the module's and the optimizer's state, buffers and steps included",
    world_sizes=ALWAYS,
    examples=cases.trainings(),
    count=3,
    first=(Training(steps=4, buffers=True),),
)
def _continues(bench: Bench, case: Training) -> None:
    expected = cases.trained_alone(case)
    with tempfile.TemporaryDirectory(prefix="fabric-kit-") as folder:
        for rank, got in enumerate(bench.run(_resume, case, folder)):
            off = distance(got, expected)
            if not off <= exact():
                raise Broken(f"rank {rank}'s parameters differ by {off:.3g}")


def _load(place: Place, change: str, strict: bool, parts: bool) -> dict[str, Any]:
    """Load a plain state that was changed, or the rank's own parts."""
    case = Training(seed=5, buffers=True)
    state: dict[str, Any] = dict(cases.copied(cases.build(case)))
    with place.fabric() as fabric:
        model, _, _ = set_up(fabric, replace(case, seed=5 if parts else 6), How())
        if parts:
            state = {name: one.detach().clone() for name, one in fabric.strategy.module_state(model, False).items()}
            other = cases.copied(cases.build(replace(case, seed=6)))
            fabric.strategy.load_module_state(model, other, True, True)
        if change == "missing":
            del state["outer.bias"]
        elif change == "additional":
            state["no.such.key"] = torch.zeros(1)
        elif change == "shape":
            state["outer.weight"] = state["outer.weight"][:, :-1]
        try:
            fabric.strategy.load_module_state(model, state, not parts, strict)
        except RuntimeError as error:
            return {"raised": str(error)}
        return {"raised": None, "whole": whole(fabric, model)}


def _check_loaded(bench: Bench, change: str, *, strict: bool, parts: bool = False) -> None:
    expected = cases.copied(cases.build(Training(seed=5, buffers=True)))
    if change == "missing":
        expected["outer.bias"] = cases.copied(cases.build(Training(seed=6, buffers=True)))["outer.bias"]
    for rank, seen in enumerate(bench.run(_load, change, strict, parts)):
        if seen["raised"] is not None or distance(seen["whole"], expected) != 0:
            raise Broken(f"rank {rank}: {seen['raised'] or 'other values are there'}")


def _check_refuses(bench: Bench, change: str, *, strict: bool, parts: bool = False) -> None:
    for rank, seen in enumerate(bench.run(_load, change, strict, parts)):
        if seen["raised"] is None:
            raise Broken(f"rank {rank} loaded it{', from its own parts' if parts else ''}")


@TABLE.rule(
    "STR-374",
    "A state from plain PyTorch loads.",
    reason="Pretrained weights come from elsewhere.",
    advice="take whole tensors under the bare module's names, and divide them",
    world_sizes=ALWAYS,
)
def _loads(bench: Bench) -> None:
    _check_loaded(bench, "none", strict=True)


@TABLE.rule(
    "STR-375",
    "Strict loading refuses a state, or own parts, that lacks a key, on every rank.",
    reason="A layer that keeps its random start ruins a result in silence.",
    advice="compare the keys, and raise RuntimeError",
    world_sizes=ALWAYS,
)
def _missing(bench: Bench) -> None:
    _check_refuses(bench, "missing", strict=True)
    _check_refuses(bench, "missing", strict=True, parts=True)


@TABLE.rule(
    "STR-376",
    "Strict loading refuses a state, or own parts, that has a key too many, on every rank.",
    reason="It is another model's.",
    advice="compare the keys, and raise RuntimeError",
    world_sizes=ALWAYS,
)
def _additional(bench: Bench) -> None:
    _check_refuses(bench, "additional", strict=True)
    _check_refuses(bench, "additional", strict=True, parts=True)


@TABLE.rule(
    "STR-377",
    "Loading that isn't strict takes what fits, from a whole state or own parts, and leaves the rest.",
    reason="Fine-tuning replaces a head.",
    advice="pass strict on",
    world_sizes=ALWAYS,
)
def _not_strict(bench: Bench) -> None:
    for parts in (False, True):
        _check_loaded(bench, "missing", strict=False, parts=parts)
        _check_loaded(bench, "additional", strict=False, parts=parts)


@TABLE.rule(
    "STR-378",
    "Loading refuses a tensor of another shape, strict or not, on every rank.",
    reason="Broadcasting it would load nonsense.",
    advice="compare the shapes, and raise RuntimeError",
    world_sizes=ALWAYS,
)
def _shapes(bench: Bench) -> None:
    _check_refuses(bench, "shape", strict=True)
    _check_refuses(bench, "shape", strict=False)


def _own_parts(place: Place) -> float:
    with place.fabric() as fabric:
        model, _, _ = set_up(fabric, Training(buffers=True), How())
        before = whole(fabric, model)
        state = {name: value.detach().clone() for name, value in fabric.strategy.module_state(model, False).items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        fabric.strategy.load_module_state(model, state, False, True)
        return distance(before, whole(fabric, model))


@TABLE.rule(
    "STR-379",
    "Each rank's own part of the state loads again.",
    reason="Sharded checkpoints never gather the model.",
    advice="give the local parts where full is False, and take them as they are",
    world_sizes=ALWAYS,
)
def _parts(bench: Bench) -> None:
    off = max(bench.run(_own_parts))
    if off != 0:
        raise Broken(f"the parameters differ by {off:.3g}")


@TABLE.rule(
    "STR-380",
    "A shard's state holds this rank's part alone.",
    reason="A state that gathers needs the memory that sharding saves.",
    advice="return module.state_dict() where full is False",
    needs=("sharded",),
    lacks=("joint_setup",),
    world_sizes=SEVERAL,
)
def _part_is_part(bench: Bench) -> None:
    for rank, (local, total) in enumerate(bench.run(_part_sizes)):
        if local >= total:
            raise Broken(f"rank {rank}'s part has {local} of {total} numbers")


def _part_sizes(place: Place) -> tuple[int, int]:
    with place.fabric() as fabric:
        model, _, _ = set_up(fabric, Training(width=4), How())
        state = fabric.strategy.module_state(model, False)
        total = sum(one.numel() for one in cases.build(Training(width=4)).parameters())
        return sum(local_part(one).numel() for one in state.values()), total
