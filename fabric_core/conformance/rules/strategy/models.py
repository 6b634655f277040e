"""Rules for strategies: models of every make, and optimizers that do more than a step."""

from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases, zoo
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Weights, distance, part
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import (
    ALWAYS,
    SEVERAL,
    full,
    refused,
    set_up_module,
    shard_of,
    whole,
)

TABLE: Final = Table("strategy", inside=False)

_TRAINED: Final = tuple(name for name in zoo.ZOO if name not in {"dropout", "a running mean"})


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Make one with decay and momentum, whose groups are in another order than the model's parameters."""
    own = [one for one in model.parameters() if one.requires_grad]
    groups = [{"params": own[1:], "lr": 0.1}, {"params": own[:1], "lr": 0.05}] if own[1:] else [{"params": own}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)


def _train(place: Place, names: tuple[str, ...]) -> dict[str, Weights | str]:
    """Train each of some models; give its parameters, or the error that it was refused with."""
    found: dict[str, Weights | str] = {}
    for name in names:
        with place.fabric() as fabric:
            model = zoo.make(name)
            try:
                wrapped, stepper = fabric.setup(model, _optimizer(model))
                shard = shard_of(fabric)
                for x in zoo.batches():
                    fabric.backward(zoo.loss(wrapped(part(x, shard).to(fabric.device))))
                    stepper.step()
                    stepper.zero_grad()
            except Exception as error:  # noqa: BLE001 - a strategy may refuse a model; how is looked at
                found[name] = refused(error)
            else:
                found[name] = whole(fabric, model)
    return found


def _trained_alone(name: str) -> Weights:
    model = zoo.make(name)
    optimizer = _optimizer(model)
    for x in zoo.batches():
        zoo.loss(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return cases.copied(model)


@TABLE.rule(
    "STR-335",
    "Models of every make train as in one process: tied word vectors, norms, convolutions, recurrent cells, parameters "
    "of several types, complex, non-contiguous, of 16 bits; or every rank refuses one with an error.",
    reason="Few users train linear layers alone.",
    advice="treat every parameter by its own type and layout, or raise SetupError on every rank",
    world_sizes=ALWAYS,
)
def _models(bench: Bench) -> None:
    every = bench.run(_train, _TRAINED)
    for name in _TRAINED:
        results = [seen[name] for seen in every]
        refusals = [one for one in results if isinstance(one, str)]
        if len(refusals) == len(results) and not any(one.startswith("lost") for one in refusals):
            continue
        if refusals:
            raise Broken(f"with {name} some ranks raise, and not all: {refusals[0]}")
        start, expected = cases.copied(zoo.make(name)), _trained_alone(name)
        for rank, got in enumerate(results):
            allowed = zoo.COARSE.get(name, 0) * distance(start, expected) + exact()
            if isinstance(got, dict) and not distance(got, expected) <= allowed:
                raise Broken(f"with {name} rank {rank}'s parameters differ by {distance(got, expected):.3g}")


def _follow(place: Place) -> tuple[dict[str, torch.Tensor], bool]:
    """Run a model whose buffers follow the data; give its whole state, and whether it still trains."""
    with place.fabric() as fabric:
        model = zoo.make("a running mean")
        wrapped = set_up_module(fabric, model)
        shard = shard_of(fabric)
        for x in zoo.batches():
            wrapped(part(x, shard).to(fabric.device))
        state = {name: full(one) for name, one in fabric.strategy.module_state(model, True).items()}
        before = model.get_buffer("seen").item()
        wrapped(part(x, shard).to(fabric.device))
        return state, model.training and model.get_buffer("seen").item() > before


@TABLE.rule(
    "STR-336",
    "Buffers that a model changes as it runs are saved as rank 0 has them, and saving leaves the model as it was.",
    reason="Running means are part of a model; a mixture of ranks' belongs to none of them.",
    advice="give rank 0's buffers where full is True, and change neither mode nor values",
    world_sizes=ALWAYS,
)
def _buffers(bench: Bench) -> None:
    seen = bench.run(_follow)
    plain = zoo.make("a running mean")
    for x in zoo.batches():
        plain(part(x, (0, bench.world_size if bench.declared["synchronous"] else 1)))
    state, training = seen[0]
    off = distance({"mean": state["mean"]}, {"mean": cases.copied(plain)["mean"]}) if "mean" in state else float("inf")
    if not off <= exact() or state["seen"] != plain.get_buffer("seen"):
        raise Broken(f"rank 0's running mean is off by {off:.3g}, and it has seen {state['seen']} rows")
    if not training:
        raise Broken("the model no longer trains")


def _left_out(place: Place) -> list[Weights]:
    """Train two layers with AdamW, of which the first steps use one alone."""
    with place.fabric() as fabric:
        model = zoo.Branching()
        wrapped, stepper = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1))
        shard = shard_of(fabric)
        try:
            for index, (x, y) in enumerate(cases.batches(cases.Training(), steps=3)):
                mine = (part(one, shard).to(fabric.device) for one in (x, torch.full((len(x),), index == 1), y))
                inputs, right, target = mine
                fabric.backward(nn.functional.mse_loss(wrapped(inputs, right), target))
                stepper.step()
                stepper.zero_grad()
        except Exception as error:
            if refused(error).startswith("lost"):
                raise
            return []
        return [whole(fabric, model)]


@TABLE.rule(
    "STR-337",
    "A parameter that no rank used keeps its gradient, None included: an optimizer with momentum and decay steps as in "
    "one process; or every rank raises.",
    reason="Zeros in the place of None let decay and momentum move what was not trained.",
    advice="leave gradients that no rank has as they are",
    world_sizes=ALWAYS,
)
def _unused(bench: Bench) -> None:
    model = zoo.Branching()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for index, (x, y) in enumerate(cases.batches(cases.Training(), steps=3)):
        nn.functional.mse_loss(model(x, torch.full((len(x),), index == 1)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    seen = bench.run(_left_out)
    if not any(seen):
        return
    for rank, got in enumerate(seen):
        off = distance(got[0], cases.copied(model)) if got else float("inf")
        if not off <= exact():
            raise Broken(f"rank {rank}'s parameters differ by {off:.3g}" if got else f"rank {rank} alone raised")


def _inputs(place: Place) -> dict[str, Any]:
    """Run a pass that differentiates one parameter alone; give which have gradients after it."""
    with place.fabric() as fabric:
        model = cases.build(cases.Training())
        wrapped = set_up_module(fabric, model)
        x, _ = next(cases.batches(cases.Training()))
        chosen = [model.outer.weight]
        try:
            fabric.backward(wrapped(x.to(fabric.device)).sum(), inputs=chosen)
        except Exception as error:  # noqa: BLE001 - how it is refused is looked at
            return {"refused": refused(error)}
        return {"with": [name for name, one in model.named_parameters() if one.grad is not None]}


@TABLE.rule(
    "STR-338",
    "`backward(inputs=...)` gives gradients to those parameters alone, or every rank raises.",
    reason="It is an argument of torch.Tensor.backward; ignored, it trains what was left out on purpose.",
    advice="pass the arguments on, or refuse what can't be done",
    world_sizes=ALWAYS,
)
def _chosen(bench: Bench) -> None:
    seen = bench.run(_inputs)
    if all("refused" in one and not one["refused"].startswith("lost") for one in seen):
        return
    for rank, one in enumerate(seen):
        if "refused" in one:
            raise Broken(f"rank {rank} raised, and not all as it did: {one['refused']}")
        if one["with"] != ["outer.weight"]:
            raise Broken(f"rank {rank} has gradients of {', '.join(one['with']) or 'none'}")


def _half_reduced(place: Place) -> bool:
    """Say whether each gradient has no more digits than the type it was asked to be reduced in."""
    from fabric_core.conformance.references import Full
    from fabric_core.contracts import PrecisionPolicy

    class Reducing(Full):
        @property
        def policy(self) -> PrecisionPolicy:
            return PrecisionPolicy(reduce_dtype=torch.bfloat16)

    with place.fabric(precision=Reducing()) as fabric:
        model = cases.build(cases.Training(width=5), torch.float32)
        wrapped = set_up_module(fabric, model)
        x, y = (one.to(fabric.device) for one in next(cases.batches(cases.Training(), torch.float32)))
        shard = shard_of(fabric)
        fabric.backward(nn.functional.mse_loss(wrapped(part(x, shard)), part(y, shard)))
        every = [full(one.grad) for one in model.parameters() if one.grad is not None]
        return bool(every) and all(torch.equal(one, one.bfloat16().float()) for one in every)


@TABLE.rule(
    "STR-339",
    "Who declares applies_mixed_precision: gradients are reduced in the policy's reduce_dtype.",
    reason="Nobody else can: the strategy alone sees them travel.",
    advice="hand reduce_dtype on to whatever reduces, or take applies_mixed_precision out of the capabilities",
    needs=("applies_mixed_precision", "distributed"),
    world_sizes=SEVERAL,
)
def _reduces(bench: Bench) -> None:
    for rank, reduced in enumerate(bench.run(_half_reduced)):
        if not reduced:
            raise Broken(f"rank {rank}'s gradients have more digits than bfloat16, which was asked for")
