"""Rules for strategies: several processes train as one does."""

import contextlib
import gc
import os
import pickle
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Clipping, Message, Script, Training, Weights, distance, part
from fabric_core.conformance.rule import Broken, Level, Table
from fabric_core.errors import MisuseError
from fabric_core.wrapping.module import strategy_module

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TABLE: Final = Table("strategy", inside=False)

_ALWAYS: Final = (1, 2)
_SEVERAL: Final = (2,)
_EXACT: Final = 1e-10
"""How far 64-bit numbers may be off that were summed in another order."""
_SCALE: Final = 1024.0


# Measurements. Each runs on every rank; what it returns goes to the driver.


def whole(fabric: Any, model: nn.Module) -> Weights:
    """Give a model's whole tensors: gathered by DTensor itself, not by the plugin."""
    state: dict[str, Any] = model.state_dict()
    if fabric.strategy.capabilities.sharded and not any(_is_dtensor(value) for value in state.values()):
        state = fabric.strategy.module_state(model, True)
    return {name: _full(value) for name, value in state.items()}


def _is_dtensor(value: Any) -> bool:
    return callable(getattr(value, "full_tensor", None))


def _full(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value.full_tensor() if _is_dtensor(value) else value
    return tensor.detach().clone().cpu()


def _gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {
        name: None if parameter.grad is None else _full(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@dataclass(frozen=True)
class _How:
    """How a script trains: by which method, with the optimizer made when, and so on."""

    method: str = "forward"
    marked: bool = True
    optimizer: str = "with"
    apart: bool = False
    unequal_start: bool = False
    several_optimizers: bool = False


def _set_up(fabric: Any, case: Training, how: _How) -> tuple[cases.Net, Any, list[Any]]:
    model = cases.build(case)
    if how.unequal_start and fabric.global_rank > 0:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(fabric.global_rank)
    if how.optimizer == "after":
        wrapped = fabric.setup_module(model)
        return model, wrapped, [fabric.setup_optimizers(cases.optimizer_for(case, wrapped.parameters()))]
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = cases.optimizers_for(case, own) if how.several_optimizers else [cases.optimizer_for(case, own)]
    if how.optimizer == "before":
        wrapped = fabric.setup_module(model)
        return model, wrapped, [fabric.setup_optimizers(one) for one in made]
    wrapped, *steppers = fabric.setup(model, *made)
    return model, wrapped, steppers


def _loss(fabric: Any, wrapped: Any, how: _How, case: Training, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    shard = fabric.strategy.data_shard()
    x, y = (part(one, shard).to(fabric.device) for one in (x, y))
    if how.method == "forward":
        return nn.functional.mse_loss(wrapped(x), y) / case.accumulate
    loss: torch.Tensor = getattr(wrapped, how.method)(x, y) / case.accumulate
    return loss


def _train(place: Place, case: Training, how: _How, **parts: Any) -> Weights:
    """Train as a user's script does; give the whole model."""
    with place.fabric(**parts) as fabric:
        model, wrapped, steppers = _set_up(fabric, case, how)
        if how.method != "forward" and how.marked:
            wrapped.mark_forward_method(how.method)
        for index, (x, y) in enumerate(cases.batches(case)):
            last = (index + 1) % case.accumulate == 0
            with fabric.no_backward_sync(wrapped, enabled=how.apart and not last):
                fabric.backward(_loss(fabric, wrapped, how, case, x, y))
            if last:
                for stepper in steppers:
                    stepper.step()
                    stepper.zero_grad()
        return whole(fabric, model)


def _scaled(place: Place, case: Training) -> Weights:
    from fabric_core.conformance.references import Scaled

    return _train(place, case, _How(), precision=Scaled())


def _check_training(bench: Bench, case: Training, how: _How, measure: Callable[..., Weights] = _train) -> None:
    expected = cases.trained_alone(case)
    arguments = (case, how) if measure is _train else (case,)
    for rank, got in enumerate(bench.run(measure, *arguments)):
        off = distance(got, expected)
        if not off <= _EXACT:
            raise Broken(f"rank {rank}'s parameters differ by {off:.3g} after {case.steps} steps")


# Training


@TABLE.rule(
    "STR-301",
    "Training on the parts of each batch ends where one process ends on whole batches.",
    reason="It is what a strategy is for: more processes, the same training.",
    advice="average gradients over the ranks, each once, before the optimizer steps",
    world_sizes=_ALWAYS,
    examples=cases.trainings(),
    count=8,
)
def _trains(bench: Bench, case: Training) -> None:
    _check_training(bench, case, _How())


@TABLE.rule(
    "STR-302",
    "After a training every rank has the same parameters, to the last bit.",
    reason="Ranks that drift apart train different models, and only one of them is saved.",
    advice="let every rank step with the same gradients, in the same order of sums",
    world_sizes=_SEVERAL,
    examples=cases.trainings(optimizer="adam"),
    count=3,
)
def _ranks_agree(bench: Bench, case: Training) -> None:
    first, *others = bench.run(_train, case, _How())
    for rank, other in enumerate(others, 1):
        if distance(first, other) != 0:
            raise Broken(f"rank {rank} differs from rank 0 by {distance(first, other):.3g}")


@TABLE.rule(
    "STR-303",
    "Ranks whose models start unequal train rank 0's.",
    reason="A script that forgot to seed must not average unlike models.",
    advice="send rank 0's parameters and buffers to all ranks in setup_module",
    world_sizes=_SEVERAL,
    examples=cases.trainings(),
    count=2,
    first=(Training(buffers=True),),
)
def _equal_start(bench: Bench, case: Training) -> None:
    _check_training(bench, case, _How(unequal_start=True))


def _accumulations() -> "SearchStrategy[Training]":
    from hypothesis import strategies as st

    return cases.trainings(accumulate=st.integers(2, 3), steps=st.integers(1, 2))()


@TABLE.rule(
    "STR-304",
    "Several backward passes before a step add up to the big batch.",
    reason="Accumulation must not depend on how gradients travel.",
    advice="average what a pass adds, not what was averaged before",
    world_sizes=_ALWAYS,
    examples=_accumulations,
    count=4,
)
def _accumulates(bench: Bench, case: Training) -> None:
    _check_training(bench, case, _How())


@TABLE.rule(
    "STR-305",
    "Several backward passes, all but the last inside `no_backward_sync`, add up to the big batch.",
    reason="It is how scripts save communication; the result is the same.",
    advice="average everything that was gathered in the pass that synchronises",
    world_sizes=_ALWAYS,
    examples=_accumulations,
    count=4,
)
def _accumulates_apart(bench: Bench, case: Training) -> None:
    _check_training(bench, case, _How(apart=True))


def _one_pass(place: Place, mode: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Run one backward pass in one of several ways; give the gradients, this rank's own, and the mean."""
    case = Training(rows=2)
    with place.fabric() as fabric:
        model, wrapped, _ = _set_up(fabric, case, _How())
        (x, y), (again, target) = cases.batches(case)
        shard = fabric.strategy.data_shard()
        if mode == "raises":
            with contextlib.suppress(ZeroDivisionError), fabric.no_backward_sync(wrapped):
                raise ZeroDivisionError
            fabric.backward(_loss(fabric, wrapped, _How(), case, again, target))
            wrapped.zero_grad()
        if mode == "past Fabric":
            inner, mine = strategy_module(wrapped), part(x, shard).to(fabric.device)
            out = inner("forward", mine) if fabric.strategy.capabilities.intercepts_forward else inner(mine)
            nn.functional.mse_loss(out, part(y, shard).to(fabric.device)).backward()
        elif mode == "raw":
            _loss(fabric, wrapped, _How(), case, x, y).backward()
        else:
            inside = fabric.no_backward_sync(wrapped, enabled=mode == "apart")
            with inside if mode != "raises" else contextlib.nullcontext():
                fabric.backward(_loss(fabric, wrapped, _How(), case, x, y) * (_SCALE if mode == "scaled" else 1.0))
        got = _gradients(model) if mode != "apart" else _local(model)
    if mode == "scaled":
        got = {name: None if one is None else one / _SCALE for name, one in got.items()}
    return got, _plain_gradients(case, part(x, shard), part(y, shard)), _plain_gradients(case, x, y)


def _local(model: nn.Module) -> dict[str, Any]:
    """Give the gradients without a collective: inside the context ranks may have none."""
    return {
        name: None if one.grad is None else getattr(one.grad, "_local_tensor", one.grad).detach().clone().cpu()
        for name, one in model.named_parameters()
    }


def _plain_gradients(case: Training, x: torch.Tensor, y: torch.Tensor, start: Weights | None = None) -> dict[str, Any]:
    plain = cases.build(case)
    if start is not None:
        plain.load_state_dict(start)
    nn.functional.mse_loss(plain(x), y).backward()
    return _gradients(plain)


def _gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    if any(value is None for value in one.values()):
        return float("inf")
    return distance(one, other)


@TABLE.rule(
    "STR-306",
    "Inside `no_backward_sync` gradients stay apart: each rank has its own, or keeps them until the end.",
    reason="Who declares it promises that nothing travels; a script counts on the time saved.",
    advice="leave gradients alone inside the context, or take no_backward_sync out of the capabilities",
    needs=("no_backward_sync",),
    world_sizes=_SEVERAL,
)
def _stays_apart(bench: Bench) -> None:
    for rank, (got, own, mean) in enumerate(bench.run(_one_pass, "apart")):
        if all(value is None for value in got.values()):
            continue
        if _gap(got, mean) <= _EXACT or (not bench.declared["sharded"] and not _gap(got, own) <= _EXACT):
            raise Broken(f"rank {rank}'s gradients are off its own by {_gap(got, own):.3g}, off the mean by "
                         f"{_gap(got, mean):.3g}")  # fmt: skip


def _check_mean(bench: Bench, mode: str) -> None:
    for rank, (got, _, mean) in enumerate(bench.run(_one_pass, mode)):
        if not _gap(got, mean) <= _EXACT:
            raise Broken(f"rank {rank}'s gradients are off the mean by {_gap(got, mean):.3g}")


@TABLE.rule(
    "STR-307",
    "Without the capability, `no_backward_sync` changes nothing: gradients are the mean.",
    reason="A strategy that can't leave them apart must not half do it; what works must be declared.",
    advice="declare no_backward_sync, or leave the context as the contract has it",
    lacks=("no_backward_sync",),
    needs=("distributed",),
    world_sizes=_SEVERAL,
)
def _synchronises_always(bench: Bench) -> None:
    for rank, (got, own, mean) in enumerate(bench.run(_one_pass, "apart")):
        if not bench.declared["sharded"] and not _gap(got, mean) <= _EXACT:
            raise Broken(f"rank {rank}'s gradients are off the mean by {_gap(got, mean):.3g}, "
                         f"off its own by {_gap(got, own):.3g}")  # fmt: skip


@TABLE.rule(
    "STR-308",
    "`no_backward_sync(enabled=False)` changes nothing: gradients are the mean.",
    reason="Scripts pass a condition.",
    advice="look at enabled",
    world_sizes=_SEVERAL,
)
def _not_enabled(bench: Bench) -> None:
    _check_mean(bench, "disabled")


@TABLE.rule(
    "STR-309",
    "An exception inside `no_backward_sync` ends it: the next pass is averaged.",
    reason="A script that catches the error and goes on must not train apart.",
    advice="undo in `finally`",
    world_sizes=_SEVERAL,
)
def _ends_on_errors(bench: Bench) -> None:
    _check_mean(bench, "raises")


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
        model = cases.Branching()
        wrapped, stepper = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        ways = _ways(sharded=fabric.strategy.capabilities.sharded)
        shard = fabric.strategy.data_shard()
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
    model = cases.Branching()
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
    world_sizes=_ALWAYS,
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
        if not distance(got, expected) <= _EXACT:
            raise Broken(f"rank {rank}'s parameters differ by {distance(got, expected):.3g}")


def _frozen(place: Place) -> tuple[bool, float, torch.Tensor]:
    with place.fabric() as fabric:
        model = cases.build(Training())
        model.requires_grad_(False)
        before = cases.copied(model)
        wrapped = fabric.setup_module(model)
        x, _ = next(cases.batches(Training()))
        y = wrapped(x.to(fabric.device)).detach().cpu()
        return not y.requires_grad, distance(before, whole(fabric, model)), y


@TABLE.rule(
    "STR-312",
    "A model with nothing to train is set up, and runs.",
    reason="A teacher or a frozen encoder goes through the same setup.",
    advice="wrap it without gradients, or give it back as it is",
    world_sizes=_ALWAYS,
)
def _nothing_to_train(bench: Bench) -> None:
    x, _ = next(cases.batches(Training()))
    expected = cases.build(Training())(x).detach()
    for rank, (_, moved, y) in enumerate(bench.run(_frozen)):
        if moved != 0 or not torch.allclose(y, expected, rtol=0, atol=_EXACT):
            raise Broken(f"rank {rank} changed it by {moved}, or computes something else")


def _shape(place: Place) -> dict[str, Any]:
    """Look at the user's module after setup."""
    case = Training(frozen=True, tied=True, buffers=True)
    with place.fabric() as fabric:
        state = torch.get_rng_state()
        plain, model = cases.build(case), cases.build(case)
        for one in (plain, model):
            one.inner.eval()
        wrapped = fabric.setup_module(model)
        x, _ = next(cases.batches(case))
        x = x.to(fabric.device)
        with torch.no_grad():
            quiet = wrapped(x, scale=2.0).cpu()
        loud = wrapped(x, scale=2.0).detach().cpu()
        before = list(plain.named_parameters())
        after = list(model.named_parameters())
        return {
            "names": [name for name, _ in after] == [name for name, _ in before],
            "keys": list(model.state_dict()) == list(plain.state_dict()),
            "frozen": [one.requires_grad for _, one in after] == [one.requires_grad for _, one in before],
            "tied": model.again.weight is model.hidden[0].weight,
            "patched": sorted(set(vars(model)) - set(vars(plain))) + ["forward"] * ("forward" in vars(model)),
            "types": all(one.dtype == other.dtype for (_, one), (_, other) in zip(before, after, strict=True)),
            "devices": {one.device.type for one in model.parameters()} == {fabric.device.type},
            "integers": model.counter.tolist() == [3, 5],
            "output": max((one - plain(x.cpu(), scale=2.0).detach()).abs().max().item() for one in (quiet, loud)),
            "modes": [one.training for one in model.modules()] == [one.training for one in plain.modules()],
            "random": torch.equal(state, torch.get_rng_state()),
            "local": sum(getattr(one, "_local_tensor", one).numel() for one in model.parameters()),
            "whole": sum(one.numel() for one in plain.parameters()),
        }


def _check_shape(bench: Bench, key: str, detail: str) -> None:
    for rank, seen in enumerate(bench.run(_shape)):
        if seen[key] is not True:
            raise Broken(f"rank {rank}: {detail}")


@TABLE.rule(
    "STR-313",
    "After setup the user's module has the same parameters' names and the same keys.",
    reason="Checkpoints, optimizers' groups and logs name parameters.",
    advice="wrap the module; rename nothing inside",
    world_sizes=_ALWAYS,
)
def _names(bench: Bench) -> None:
    _check_shape(bench, "names", "named_parameters has other names")
    _check_shape(bench, "keys", "state_dict has other keys")


@TABLE.rule(
    "STR-314",
    "After setup what was frozen is frozen, and what was shared is shared.",
    reason="Tied embeddings that come apart train two weights.",
    advice="replace a shared parameter everywhere by the same new one, and copy requires_grad",
    world_sizes=_ALWAYS,
)
def _sharing(bench: Bench) -> None:
    _check_shape(bench, "frozen", "requires_grad differs")
    _check_shape(bench, "tied", "a weight that two layers shared is two weights")


@TABLE.rule(
    "STR-315",
    "Setup sets no attribute on the user's module.",
    reason="The module is the user's: it is pickled, copied, compiled, and set up again elsewhere.",
    advice="keep what belongs to a module in the wrapper, or in a table of the strategy",
    level=Level.SHOULD,
    lacks=("sharded",),
    world_sizes=_ALWAYS,
)
def _patches_nothing(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_shape)):
        if seen["patched"]:
            raise Broken(f"rank {rank}: it sets {', '.join(seen['patched'])}")


@TABLE.rule(
    "STR-316",
    "After setup parameters lie on the process's device, in their own types, and integers are unchanged.",
    reason="Types are the precision's business.",
    advice="move, and don't convert",
    world_sizes=_ALWAYS,
)
def _places(bench: Bench) -> None:
    _check_shape(bench, "types", "parameters have other types")
    _check_shape(bench, "devices", "parameters lie on another device")
    _check_shape(bench, "integers", "a buffer of integers is changed")


@TABLE.rule(
    "STR-317",
    "The module that comes back takes the same arguments and returns the same values, with and without gradients; "
    "what was training is training, and what was not is not.",
    reason="A script calls it as it called its own.",
    advice="pass positional and keyword arguments on, return what comes, and call neither train() nor eval()",
    world_sizes=_ALWAYS,
)
def _same_values(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_shape)):
        if not seen["output"] <= _EXACT:
            raise Broken(f"rank {rank}: the output differs by {seen['output']:.3g}")
    _check_shape(bench, "modes", "module.training is changed")


@TABLE.rule(
    "STR-318",
    "Setting a model up draws no random number.",
    reason="The same seed must give the same data order under every strategy.",
    advice="use a generator of your own",
    level=Level.SHOULD,
    world_sizes=_ALWAYS,
)
def _draws_nothing(bench: Bench) -> None:
    _check_shape(bench, "random", "the random state is another after setup")


@TABLE.rule(
    "STR-319",
    "Who declares to shard keeps less than the whole model on each rank.",
    reason="It is what a user chooses it for.",
    advice="shard in setup_module, or take sharded out of the capabilities",
    needs=("sharded",),
    world_sizes=_SEVERAL,
)
def _shards(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_shape)):
        if seen["local"] >= seen["whole"]:
            raise Broken(f"rank {rank} holds {seen['local']} of {seen['whole']} numbers")


@TABLE.rule(
    "STR-320",
    "Who doesn't declare to shard leaves parameters whole, as plain tensors.",
    reason="Scripts, wrappers and checkpoints look at them.",
    advice="declare sharded",
    lacks=("sharded",),
    world_sizes=_SEVERAL,
)
def _does_not_shard(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_shape)):
        if seen["local"] != seen["whole"]:
            raise Broken(f"rank {rank} holds {seen['local']} of {seen['whole']} numbers")


@TABLE.rule(
    "STR-321",
    "A method that is marked trains as `forward` does.",
    reason="Models have training_step, generate, encode; what they compute must be synchronised too.",
    advice="declare intercepts_forward, and run whatever passes through the module that setup_module returned",
    world_sizes=_ALWAYS,
    examples=cases.trainings(buffers=False),
    count=3,
)
def _marked(bench: Bench, case: Training) -> None:
    _check_training(bench, case, _How(method="training_loss"))


def _unmarked(place: Place) -> str:
    try:
        _train(place, Training(steps=1), _How(method="training_loss", marked=False))
    except MisuseError as error:
        return f"refused: {error.what}"
    return "ran"


@TABLE.rule(
    "STR-322",
    "Who declares intercepts_forward: a method that isn't marked is refused when it runs the model.",
    reason="It would train without synchronising, silently.",
    advice="leave submodules reachable by hooks, as nn.Module.__call__ does",
    needs=("intercepts_forward",),
    world_sizes=_ALWAYS,
)
def _refuses_unmarked(bench: Bench) -> None:
    for rank, outcome in enumerate(bench.run(_unmarked)):
        if not outcome.startswith("refused"):
            raise Broken(f"rank {rank}: the method {outcome}")


@TABLE.rule(
    "STR-323",
    "Who doesn't declare intercepts_forward trains rightly through any method, marked or not.",
    reason="Undeclared, nothing refuses such a method.",
    advice="declare intercepts_forward",
    lacks=("intercepts_forward",),
    world_sizes=_ALWAYS,
    examples=cases.trainings(buffers=False),
    count=3,
)
def _needs_no_mark(bench: Bench, case: Training) -> None:
    _check_training(bench, case, _How(method="training_loss", marked=False))


@TABLE.rule(
    "STR-324",
    "An optimizer that was made before the model's setup, and is set up after it, trains the model.",
    reason="An optimizer of parameters that were replaced steps, and trains nothing.",
    advice="replace parameters in setup_optimizer as `replaced` says, or refuse with SetupError",
    lacks=("joint_setup",),
    world_sizes=_ALWAYS,
    examples=cases.trainings(),
    count=3,
)
def _optimizer_before(bench: Bench, case: Training) -> None:
    _check_training(bench, case, _How(optimizer="before"))


@TABLE.rule(
    "STR-325",
    "An optimizer that is made after the model's setup trains the model.",
    reason="It is the other usual order.",
    advice="leave parameters in setup_optimizer that are in no `replaced`",
    lacks=("joint_setup",),
    world_sizes=_ALWAYS,
    examples=cases.trainings(),
    count=3,
)
def _optimizer_after(bench: Bench, case: Training) -> None:
    _check_training(bench, case, _How(optimizer="after"))


def _two_models(place: Place) -> tuple[Weights, Weights] | str:
    """Train two models in turn; while the second is trained, the first one's gradients may stay apart."""
    first, second = Training(seed=1), Training(seed=2, optimizer="adam")
    with place.fabric() as fabric:
        one = _set_up(fabric, first, _How())
        try:
            two = _set_up(fabric, second, _How())
        except (RuntimeError, ValueError) as error:
            return str(error)
        for pairs in zip(cases.batches(first), cases.batches(second), strict=True):
            for (_, wrapped, steppers), case, (x, y) in zip((one, two), (first, second), pairs, strict=True):
                with fabric.no_backward_sync(one[1], enabled=case is second):
                    fabric.backward(_loss(fabric, wrapped, _How(), case, x, y))
                steppers[0].step()
                steppers[0].zero_grad()
        return whole(fabric, one[0]), whole(fabric, two[0])


@TABLE.rule(
    "STR-326",
    "Two models that are set up and trained in turn end where each alone ends, also while the other is inside "
    "`no_backward_sync`.",
    reason="Generators and discriminators, teachers and students.",
    advice="keep state for each module, or take multiple_models out of the capabilities",
    needs=("multiple_models",),
    world_sizes=_ALWAYS,
)
def _several_models(bench: Bench) -> None:
    expected = (cases.trained_alone(Training(seed=1)), cases.trained_alone(Training(seed=2, optimizer="adam")))
    for rank, got in enumerate(bench.run(_two_models)):
        if isinstance(got, str):
            raise Broken(f"rank {rank} raised: {got}")
        off = max(distance(one, other) for one, other in zip(got, expected, strict=True))
        if not off <= _EXACT:
            raise Broken(f"rank {rank}'s parameters differ by {off:.3g}")


@TABLE.rule(
    "STR-327",
    "Without the capability, a second model is refused.",
    reason="What works must be declared; what doesn't must not half work.",
    advice="declare multiple_models, or raise SetupError at the second setup",
    lacks=("multiple_models",),
    world_sizes=_ALWAYS,
)
def _one_model(bench: Bench) -> None:
    for rank, got in enumerate(bench.run(_two_models)):
        if not isinstance(got, str):
            raise Broken(f"rank {rank} trained two models")


@TABLE.rule(
    "STR-328",
    "Two optimizers that share a model's parameters between them train it as one does.",
    reason="Different parts learn at different rates.",
    advice="make every optimizer ready on its own, or take multiple_optimizers out of the capabilities",
    needs=("multiple_optimizers",),
    world_sizes=_ALWAYS,
    examples=cases.trainings(frozen=False),
    count=2,
)
def _several_optimizers(bench: Bench, case: Training) -> None:
    _check_training(bench, case, _How(several_optimizers=True))


def _second_optimizer(place: Place) -> bool:
    try:
        _train(place, Training(), _How(several_optimizers=True))
    except (RuntimeError, ValueError):
        return True
    return False


@TABLE.rule(
    "STR-329",
    "Without the capability, a second optimizer is refused.",
    reason="What works must be declared; what doesn't must not half work.",
    advice="declare multiple_optimizers, or raise SetupError",
    lacks=("multiple_optimizers",),
    world_sizes=_ALWAYS,
)
def _one_optimizer(bench: Bench) -> None:
    if not all(bench.run(_second_optimizer)):
        raise Broken("two optimizers train one model")


def _closure(place: Place) -> tuple[float, float, bool]:
    """Step with a closure, and run a graph backward twice."""
    case = Training(optimizer="sgd")
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = _set_up(fabric, case, _How())
        (x, y), _ = cases.batches(case)

        def closure() -> torch.Tensor:
            stepper.zero_grad()
            loss = _loss(fabric, wrapped, _How(), case, x, y)
            fabric.backward(loss)
            return loss

        result = stepper.step(closure)
        stepper.zero_grad()
        plain = cases.build(case)
        optimizer = cases.optimizer_for(case, plain.parameters())
        nn.functional.mse_loss(plain(x), y).backward()
        optimizer.step()
        off = distance(whole(fabric, model), cases.copied(plain))
        return off, float("nan") if result is None else float(result.detach()), isinstance(result, torch.Tensor)


@TABLE.rule(
    "STR-330",
    "A step with a closure runs it, steps, and returns what it returned.",
    reason="It is the contract of torch.optim.Optimizer.step.",
    advice="return optimizer.step(closure)",
    world_sizes=_ALWAYS,
)
def _closures(bench: Bench) -> None:
    for rank, (off, value, is_tensor) in enumerate(bench.run(_closure)):
        if not is_tensor or not value >= 0:
            raise Broken(f"rank {rank}: step(closure) returns {value}")
        if not off <= _EXACT:
            raise Broken(f"rank {rank}'s parameters differ by {off:.3g}")


def _twice(place: Place) -> float:
    case = Training(optimizer="sgd")
    with place.fabric() as fabric:
        model, wrapped, _ = _set_up(fabric, case, _How())
        (x, y), _ = cases.batches(case)
        loss = _loss(fabric, wrapped, _How(), case, x, y)
        with fabric.no_backward_sync(wrapped):
            fabric.backward(loss, retain_graph=True)
            retained = loss.grad_fn is not None
            first = _local(model)
            fabric.backward(loss, gradient=torch.tensor(2.0, dtype=torch.float64, device=fabric.device))
            second = _local(model)
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
    if not off <= _EXACT:
        raise Broken(f"after a second pass with gradient=2 the gradients are off by {off:.3g}")


@TABLE.rule(
    "STR-332",
    "Who doesn't declare requires_strategy_backward: after `loss.backward()` the gradients are the mean too.",
    reason="Undeclared, nothing refuses such a call.",
    advice="declare requires_strategy_backward, or average in hooks of autograd",
    lacks=("requires_strategy_backward",),
    world_sizes=_ALWAYS,
)
def _needs_no_backward(bench: Bench) -> None:
    _check_mean(bench, "raw")


@TABLE.rule(
    "STR-333",
    "Who declares requires_strategy_backward needs it: after a raw backward pass the gradients are not the mean.",
    reason="What works must be declared: a script's `loss.backward()` is refused because of it.",
    advice="take requires_strategy_backward out of the capabilities",
    needs=("requires_strategy_backward",),
    world_sizes=_ALWAYS,
)
def _needs_backward(bench: Bench) -> None:
    if bench.world_size < (bench.declared["max_world_size"] or _SEVERAL[0]):
        return
    if all(_gap(got, mean) <= _EXACT for got, _, mean in bench.run(_one_pass, "past Fabric")):
        raise Broken("they are")


def _from_meta(place: Place) -> float:
    case = Training(seed=5)
    expected = cases.copied(cases.build(case))
    with place.fabric() as fabric:
        with torch.device("meta"):
            model = cases.build(case)
        fabric.setup_module(model)
        fabric.strategy.load_module_state(model, expected, True, True)
        return distance(whole(fabric, model), expected)


@TABLE.rule(
    "STR-334",
    "Who declares handles_device_placement: a model on the meta device is set up, and takes a state.",
    reason="The core moves no such model; it may never fit on one device.",
    advice="make room on the device as you shard, or take handles_device_placement out of the capabilities",
    needs=("handles_device_placement",),
    world_sizes=_ALWAYS,
)
def _takes_meta(bench: Bench) -> None:
    for rank, off in enumerate(bench.run(_from_meta)):
        if off != 0:
            raise Broken(f"rank {rank}'s parameters are off the state by {off:.3g}")


# Clipping


def _clippings() -> "SearchStrategy[Clipping]":
    from hypothesis import strategies as st

    return st.builds(
        Clipping, st.sampled_from([1.0, 2.0, 3.0, float("inf")]), st.sampled_from([0.01, 0.1, 1e6]), st.integers(0, 99)
    )


def _clip(place: Place, clipping: Clipping, by: str) -> dict[str, Any]:
    case = Training(seed=clipping.seed)
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = _set_up(fabric, case, _How())
        x, y = next(cases.batches(case))
        fabric.backward(_loss(fabric, wrapped, _How(), case, x, y))
        if by == "infinity" and fabric.global_rank == fabric.world_size - 1:
            gradient: Any = next(one.grad for one in model.parameters() if one.grad is not None)
            getattr(gradient, "_local_tensor", gradient).view(-1)[:1] = float("inf")
        norm: Any = None
        try:
            if by == "value":
                fabric.clip_gradients(wrapped, stepper, clip_val=clipping.max_norm)
            else:
                norm = fabric.clip_gradients(wrapped, stepper, max_norm=clipping.max_norm, norm_type=clipping.norm_type)
        except RuntimeError as error:
            return {"raised": str(error)}
        return {
            "raised": None,
            "norm": None if norm is None else float(norm),
            "plain": type(norm) is torch.Tensor and norm.ndim == 0,
            "gradients": _gradients(model),
        }


def _clipped_alone(clipping: Clipping, by: str) -> tuple[float, dict[str, Any]]:
    case = Training(seed=clipping.seed)
    plain = cases.build(case)
    x, y = next(cases.batches(case))
    nn.functional.mse_loss(plain(x), y).backward()
    if by == "value":
        nn.utils.clip_grad_value_(plain.parameters(), clipping.max_norm)
        return 0.0, _gradients(plain)
    norm = nn.utils.clip_grad_norm_(plain.parameters(), clipping.max_norm, clipping.norm_type)
    return norm.item(), _gradients(plain)


@TABLE.rule(
    "STR-340",
    "`clip_grad_norm` gives the norm of the whole model's gradients before clipping, the same on every rank.",
    reason="A norm of shards clips each rank by another factor.",
    advice="combine the ranks' norms: sum the p-th powers, or take the maximum for inf",
    world_sizes=_ALWAYS,
    examples=_clippings,
    count=5,
)
def _norm(bench: Bench, clipping: Clipping) -> None:
    expected, _ = _clipped_alone(clipping, "norm")
    for rank, seen in enumerate(bench.run(_clip, clipping, "norm")):
        if seen["raised"] is not None or not abs(seen["norm"] - expected) <= _EXACT * max(1.0, expected):
            raise Broken(f"rank {rank}: {seen['raised'] or seen['norm']}, and the whole norm is {expected:.9g}")


@TABLE.rule(
    "STR-341",
    "`clip_grad_norm` scales every gradient as plain PyTorch does on the whole model.",
    reason="Clipping is part of the training; with other gradients it is another training.",
    advice="multiply every gradient by max_norm / norm where that is below one",
    world_sizes=_ALWAYS,
    examples=_clippings,
    count=5,
)
def _clips(bench: Bench, clipping: Clipping) -> None:
    _, expected = _clipped_alone(clipping, "norm")
    for rank, seen in enumerate(bench.run(_clip, clipping, "norm")):
        if seen["raised"] is not None or not _gap(seen["gradients"], expected) <= _EXACT:
            raise Broken(f"rank {rank}: {seen['raised'] or 'the gradients are off'}")


@TABLE.rule(
    "STR-342",
    "The norm is a plain tensor without dimensions.",
    reason="Scripts log it and compare it.",
    advice="call .full_tensor() on a distributed one",
    world_sizes=_ALWAYS,
)
def _plain_norm(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_clip, Clipping(), "norm")):
        if not seen.get("plain"):
            raise Broken(f"rank {rank}: {seen['raised'] or 'it is something else'}")


@TABLE.rule(
    "STR-343",
    "With `error_if_nonfinite`, an infinity on one rank raises RuntimeError on every rank.",
    reason="A rank that goes on alone hangs in the next collective.",
    advice="decide by the whole norm, which is infinite on every rank",
    world_sizes=_ALWAYS,
)
def _nonfinite(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_clip, Clipping(), "infinity")):
        if seen["raised"] is None and bench.world_size == 1:
            raise Broken(f"rank {rank} clipped to a norm of {seen['norm']}")
        if seen["raised"] is None and (bench.declared["sharded"] or rank == bench.world_size - 1):
            raise Broken(f"rank {rank} clipped to a norm of {seen['norm']}")


@TABLE.rule(
    "STR-344",
    "`clip_grad_value` clips every element of every gradient.",
    reason="It needs no norm, and still must reach all.",
    advice="clamp the gradients in place",
    world_sizes=_ALWAYS,
    examples=_clippings,
    count=3,
)
def _value(bench: Bench, clipping: Clipping) -> None:
    _, expected = _clipped_alone(clipping, "value")
    for rank, seen in enumerate(bench.run(_clip, clipping, "value")):
        if seen["raised"] is not None or not _gap(seen["gradients"], expected) <= _EXACT:
            raise Broken(f"rank {rank}: {seen['raised'] or 'the gradients are off'}")


# Collectives


_OPERATIONS: Final = ("sum", "mean", "max", "min", "product")
_SEVERAL_ELEMENTS: Final = (
    cases.Tensors(shape=(2, 3), dtype="float64", transposed=True),
    cases.Tensors(shape=(3, 1, 2), dtype="int32"),
    cases.Tensors(shape=(0, 3)),
)
_UNEVEN: Final = (
    cases.Tensors(shape=(2, 3), dtype="float64", transposed=True, uneven=True),
    cases.Tensors(shape=(0, 3), dtype="int32", uneven=True),
)


def _reduce(place: Place, example: cases.Tensors) -> dict[str, dict[str, Any]]:
    """Reduce by every operation through the plugin, and through the kit's own group."""
    with place.fabric() as fabric, place.oracle() as group:
        return {operation: _reduce_by(place, fabric, group, example, operation) for operation in _OPERATIONS}


def _reduce_by(place: Place, fabric: Any, group: Any, example: cases.Tensors, operation: str) -> dict[str, Any]:
    import torch.distributed as dist

    mine = example.make(place.rank).to(fabric.device)
    before = mine.clone()
    got = fabric.strategy.all_reduce(mine, None, operation)
    expected = before.clone(memory_format=torch.contiguous_format).cpu()
    options: Any = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.SUM if operation == "mean" else getattr(dist.ReduceOp, operation.upper())
    if expected.numel():
        group.allreduce([expected], options).wait()
    if operation == "mean":
        expected = expected / place.world_size
    aliased = got.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr() and mine.numel() > 0
    return {"got": got.cpu(), "expected": expected, "kept": torch.equal(mine, before), "aliased": aliased}


@TABLE.rule(
    "STR-350",
    "`all_reduce` gives what raw torch.distributed gives, for sum, mean, max, min and product.",
    reason="Metrics and decisions are reduced by it.",
    advice="reduce over all ranks with the operation that is named; a mean divides by their number",
    world_sizes=_ALWAYS,
    examples=cases.tensors(),
    count=3,
    first=_SEVERAL_ELEMENTS,
)
def _all_reduce(bench: Bench, example: cases.Tensors) -> None:
    for rank, seen in enumerate(bench.run(_reduce, example)):
        for operation, one in seen.items():
            got, expected = one["got"], one["expected"]
            if got.shape == expected.shape and not torch.equal(got.to(expected.dtype), expected):
                raise Broken(f"rank {rank}: {operation} gives {got.tolist()}, and raw torch.distributed "
                             f"{expected.tolist()}")  # fmt: skip


@TABLE.rule(
    "STR-351",
    "`all_reduce` leaves its argument alone and gives a new tensor.",
    reason="A loss that is logged is still differentiated.",
    advice="reduce a clone",
    world_sizes=_ALWAYS,
    examples=cases.tensors(),
    count=2,
    first=_SEVERAL_ELEMENTS[:1],
)
def _reduces_a_copy(bench: Bench, example: cases.Tensors) -> None:
    for rank, seen in enumerate(bench.run(_reduce, example)):
        for operation, one in seen.items():
            if not one["kept"] or one["aliased"]:
                raise Broken(f"rank {rank}: {operation} changed its argument, or gave it back")


def _counts() -> "SearchStrategy[cases.Tensors]":
    from hypothesis import strategies as st

    return cases.tensors(dtype=st.sampled_from(["int64", "int32", "float32"]), shape=st.just((2, 3)))()


@TABLE.rule(
    "STR-352",
    "`all_reduce` keeps shape and type, but for a mean of integers, which is of the default floating-point type.",
    reason="A count stays a count, and an average of counts is not cut to a whole number.",
    advice="divide integers with torch.true_divide",
    world_sizes=_ALWAYS,
    examples=_counts,
    count=4,
)
def _keeps_types(bench: Bench, example: cases.Tensors) -> None:
    for rank, seen in enumerate(bench.run(_reduce, example)):
        for operation, one in seen.items():
            if one["got"].dtype != one["expected"].dtype or one["got"].shape != one["expected"].shape:
                raise Broken(f"rank {rank}: {operation} gives {one['got'].dtype} {tuple(one['got'].shape)}")


def _misuse(place: Place, what: str) -> str:
    with place.fabric() as fabric:
        try:
            if what == "reduce_op":
                fabric.strategy.all_reduce(torch.ones(1, device=fabric.device), None, "no such")
            else:
                fabric.strategy.broadcast("text", place.world_size)
        except ValueError:
            return "refused"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the wrong one
            return f"raised {error!r}"
        return "took it"


def _check_refused(bench: Bench, what: str) -> None:
    for rank, outcome in enumerate(bench.run(_misuse, what)):
        if outcome != "refused":
            raise Broken(f"rank {rank} {outcome}")


@TABLE.rule(
    "STR-353",
    "`all_reduce` refuses an operation that there isn't, with a ValueError.",
    reason="A misspelt operation must not become a sum.",
    advice="raise RequestError",
    world_sizes=_ALWAYS,
)
def _no_such_operation(bench: Bench) -> None:
    _check_refused(bench, "reduce_op")


def _gather(place: Place, example: cases.Tensors) -> list[torch.Tensor]:
    with place.fabric() as fabric:
        parts = fabric.strategy.all_gather(example.make(place.rank).to(fabric.device), None, False)
        return [one.cpu() for one in parts]


def _check_gather(bench: Bench, example: cases.Tensors) -> None:
    expected = [example.make(rank) for rank in range(bench.world_size)]
    for rank, parts in enumerate(bench.run(_gather, example)):
        if len(parts) != len(expected) or any(
            one.dtype != other.dtype or not torch.equal(one, other) for one, other in zip(parts, expected, strict=True)
        ):
            raise Broken(f"rank {rank} has {parts}, and the ranks gave {expected}")


@TABLE.rule(
    "STR-354",
    "`all_gather` gives every rank's tensor, in the order of the ranks.",
    reason="Predictions are put back in order by it.",
    advice="gather, and keep the order",
    world_sizes=_ALWAYS,
    examples=cases.tensors(),
    count=3,
    first=_SEVERAL_ELEMENTS,
)
def _all_gather(bench: Bench, example: cases.Tensors) -> None:
    _check_gather(bench, example)


@TABLE.rule(
    "STR-355",
    "`all_gather` takes tensors whose shapes differ between ranks.",
    reason="The last batch is smaller on some ranks.",
    advice="exchange the shapes, pad, and cut",
    world_sizes=_SEVERAL,
    examples=cases.tensors(uneven=True),
    count=3,
    first=_UNEVEN,
)
def _uneven(bench: Bench, example: cases.Tensors) -> None:
    _check_gather(bench, example)


def _gather_gradients(place: Place) -> list[float]:
    with place.fabric() as fabric:
        mine = torch.full((2,), float(place.rank + 1), device=fabric.device, requires_grad=True)
        parts = fabric.strategy.all_gather(mine, None, True)
        torch.stack([(index + 1) * one.sum() for index, one in enumerate(parts)]).sum().backward()
        return [] if mine.grad is None else mine.grad.tolist()


@TABLE.rule(
    "STR-356",
    "`all_gather(sync_grads=True)` lets gradients flow back to the rank that a tensor came from.",
    reason="Contrastive losses compare every rank's features.",
    advice="use torch.distributed.nn.functional.all_gather",
    world_sizes=_ALWAYS,
)
def _gradients_flow(bench: Bench) -> None:
    size = bench.world_size
    for rank, got in enumerate(bench.run(_gather_gradients)):
        # Each of `size` ranks computed the same sum, in which this rank's tensor has the factor rank + 1.
        if got != [float(size * (rank + 1))] * 2:
            raise Broken(f"rank {rank} has the gradient {got}, and it is {size * (rank + 1)}")


def _messages() -> "SearchStrategy[Message]":
    from hypothesis import strategies as st

    leaf = st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=3) | st.binary(max_size=3)

    def grow(inner: "SearchStrategy[Any]") -> "SearchStrategy[Any]":
        return st.lists(inner, max_size=2) | st.dictionaries(st.text("k"), inner, max_size=2)

    content = st.recursive(leaf, grow, max_leaves=3)
    return st.builds(Message, content, st.integers(0, 1))


def _broadcast(place: Place, message: Message) -> Any:
    with place.fabric() as fabric:
        src = message.src % place.world_size
        tensor = fabric.strategy.broadcast(torch.full((2,), float(place.rank)), src)
        mine = message.content if place.rank == src else f"rank {place.rank}'s own"
        return fabric.strategy.broadcast(mine, src), tensor.tolist()


@TABLE.rule(
    "STR-357",
    "`broadcast` gives every rank the object of the rank that is named.",
    reason="Paths, seeds and decisions are agreed on by it.",
    advice="send from src, a global rank; return what arrived",
    world_sizes=_ALWAYS,
    examples=_messages,
    count=4,
    first=(Message({"key": [1, None, b"x"]}, 1),),
)
def _broadcasts(bench: Bench, message: Message) -> None:
    src = message.src % bench.world_size
    for rank, (got, tensor) in enumerate(bench.run(_broadcast, message)):
        if got != message.content or tensor != [float(src)] * 2:
            raise Broken(f"rank {rank} has {got!r} and {tensor}, and rank {src} sent {message.content!r}")


@TABLE.rule(
    "STR-358",
    "`broadcast` refuses a rank that there isn't on every rank, with a ValueError.",
    reason="Otherwise some ranks wait for ever.",
    advice="compare src with the world size before anything is sent",
    world_sizes=_ALWAYS,
)
def _no_such_rank(bench: Bench) -> None:
    _check_refused(bench, "src")


def _wait(place: Place) -> tuple[float, float]:
    with place.fabric() as fabric:
        fabric.strategy.barrier(None)
        time.sleep(0.3 * place.rank)
        arrived = time.monotonic()
        fabric.strategy.barrier("the kit's")
        return arrived, time.monotonic()


@TABLE.rule(
    "STR-359",
    "`barrier` lets no rank on before every rank is there.",
    reason="One rank downloads, the others wait.",
    advice="use torch.distributed.barrier",
    world_sizes=_SEVERAL,
)
def _barrier(bench: Bench) -> None:
    seen = bench.run(_wait)
    last = max(arrived for arrived, _ in seen)
    early = [rank for rank, (_, left) in enumerate(seen) if left < last]
    if early:
        raise Broken(f"rank {early[0]} went on before the last one came")


def _in_group(place: Place) -> tuple[float, int] | None:
    import torch.distributed as dist

    with place.fabric() as fabric:
        if not dist.is_initialized():
            return None
        groups = [dist.new_group([rank]) for rank in range(place.world_size)]
        mine = torch.full((1,), float(place.rank + 1), device=fabric.device)
        reduced = fabric.strategy.all_reduce(mine, groups[place.rank], "sum")
        gathered = fabric.strategy.all_gather(mine, groups[place.rank], False)
        return reduced.item(), len(gathered)


@TABLE.rule(
    "STR-360",
    "`all_reduce` and `all_gather` stay inside the group that they are given.",
    reason="Pipelines and experts reduce among a few ranks.",
    advice="pass group on",
    needs=("distributed",),
    world_sizes=_SEVERAL,
)
def _groups(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_in_group)):
        if seen not in (None, (float(rank + 1), 1)):
            raise Broken(f"rank {rank}, alone in its group, has the sum {seen[0]} of {seen[1]} tensors")


def _shard_of(place: Place) -> tuple[tuple[int, int], float]:
    with place.fabric() as fabric:
        joined = fabric.strategy.all_reduce(torch.ones(1, device=fabric.device), None, "sum").item()
        return tuple(fabric.strategy.data_shard()), joined  # type: ignore[return-value]


@TABLE.rule(
    "STR-361",
    "`data_shard` divides the data: every part is read, by equally many ranks.",
    reason="A part that nobody reads isn't learnt; one that is read twice counts twice.",
    advice="give (global rank, world size), or the place in the mesh's data dimensions",
    world_sizes=_ALWAYS,
)
def _data_shard(bench: Bench) -> None:
    parts = [one for one, _ in bench.run(_shard_of)]
    counts = {count for _, count in parts}
    read = [index for index, _ in parts]
    if len(counts) != 1 or {read.count(index) for index in range(counts.pop())} != {len(read) // len(set(read))}:
        raise Broken(f"the ranks read {parts}")


@TABLE.rule(
    "STR-362",
    "Who declares to be distributed joins all ranks.",
    reason="The plan gives it several processes because of it.",
    advice="join the world in connect",
    needs=("distributed",),
    world_sizes=_ALWAYS,
)
def _joins(bench: Bench) -> None:
    for rank, (_, joined) in enumerate(bench.run(_shard_of)):
        if joined != bench.world_size:
            raise Broken(f"rank {rank} sees {joined:g} of {bench.world_size} ranks")


@TABLE.rule(
    "STR-363",
    "Who doesn't declare to be distributed declares one process at most.",
    reason="Several processes that don't know each other train several models.",
    advice="set max_world_size=1, or declare distributed",
    lacks=("distributed",),
    world_sizes=_ALWAYS,
)
def _one_process(bench: Bench) -> None:
    if bench.declared["max_world_size"] != 1:
        raise Broken(f"max_world_size is {bench.declared['max_world_size']}")


# State


def _states(place: Place, case: Training) -> dict[str, Any]:
    """Train, and give the consolidated state."""
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = _set_up(fabric, case, _How())
        for x, y in cases.batches(case):
            fabric.backward(_loss(fabric, wrapped, _How(), case, x, y))
            stepper.step()
            stepper.zero_grad()
        state = fabric.strategy.module_state(model, True)
        optimizer = fabric.strategy.optimizer_state(stepper.optimizer, True)
        plain = all(type(one) in {torch.Tensor, nn.Parameter} and one.device.type == "cpu" for one in state.values())
        return {
            "keys": list(state),
            "plain": plain,
            "state": {name: _full(one) for name, one in state.items()} if plain else {},
            "optimizer": pickle.dumps(optimizer),
            "whole": whole(fabric, model),
        }


@TABLE.rule(
    "STR-370",
    "The consolidated state has the bare module's keys, in whole tensors with the trained values, on rank 0.",
    reason="A checkpoint is loaded by plain PyTorch, and under other strategies.",
    advice="gather, and take every prefix off the names",
    world_sizes=_ALWAYS,
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
    world_sizes=_ALWAYS,
)
def _plain_state(bench: Bench) -> None:
    if not bench.run(_states, Training())[0]["plain"]:
        raise Broken("some are distributed, or lie on a device")


@TABLE.rule(
    "STR-372",
    "The consolidated state of model and optimizer goes on training in plain PyTorch as if nothing had happened.",
    reason="The format is torch's, so that a user is never locked in.",
    advice="give the optimizer's state in the form of torch.optim.Optimizer.state_dict, with whole tensors",
    world_sizes=_ALWAYS,
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
    if not off <= _EXACT:
        raise Broken(f"after one more step the parameters differ by {off:.3g}")


def _resume(place: Place, case: Training, folder: str) -> Weights:
    """Train the first half, save, and continue in a new Fabric with another model."""
    path = Path(folder) / "state.pt"
    half = max(1, case.steps // 2)
    every = list(cases.batches(case))
    for first in (True, False):
        with place.fabric() as fabric:
            start = case if first else replace(case, seed=case.seed + 1)
            model, wrapped, (stepper,) = _set_up(fabric, start, _How())
            state = {"model": wrapped, "optimizer": stepper, "epoch": 7}
            if not first:
                fabric.load(path, state)
                if state["epoch"] != 7:
                    raise Broken("a plain value did not come back")
            for x, y in every[:half] if first else every[half:]:
                fabric.backward(_loss(fabric, wrapped, _How(), case, x, y))
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
    world_sizes=_ALWAYS,
    examples=cases.trainings(),
    count=3,
    first=(Training(steps=4, buffers=True),),
)
def _continues(bench: Bench, case: Training) -> None:
    expected = cases.trained_alone(case)
    with tempfile.TemporaryDirectory(prefix="fabric-kit-") as folder:
        for rank, got in enumerate(bench.run(_resume, case, folder)):
            off = distance(got, expected)
            if not off <= _EXACT:
                raise Broken(f"rank {rank}'s parameters differ by {off:.3g}")


def _load(place: Place, change: str, strict: bool) -> dict[str, Any]:
    """Load a plain state that was changed."""
    case = Training(seed=5, buffers=True)
    state = cases.copied(cases.build(case))
    if change == "missing":
        del state["outer.bias"]
    elif change == "additional":
        state["no.such.key"] = torch.zeros(1)
    elif change == "shape":
        state["outer.weight"] = state["outer.weight"][:, :-1]
    with place.fabric() as fabric:
        model, _, _ = _set_up(fabric, replace(case, seed=6), _How())
        try:
            fabric.strategy.load_module_state(model, state, True, strict)
        except RuntimeError as error:
            return {"raised": str(error)}
        return {"raised": None, "whole": whole(fabric, model)}


def _check_loaded(bench: Bench, change: str, *, strict: bool) -> None:
    expected = cases.copied(cases.build(Training(seed=5, buffers=True)))
    if change == "missing":
        expected["outer.bias"] = cases.copied(cases.build(Training(seed=6, buffers=True)))["outer.bias"]
    for rank, seen in enumerate(bench.run(_load, change, strict)):
        if seen["raised"] is not None or distance(seen["whole"], expected) != 0:
            raise Broken(f"rank {rank}: {seen['raised'] or 'other values are there'}")


def _check_refuses(bench: Bench, change: str, *, strict: bool) -> None:
    for rank, seen in enumerate(bench.run(_load, change, strict)):
        if seen["raised"] is None:
            raise Broken(f"rank {rank} loaded it")


@TABLE.rule(
    "STR-374",
    "A state from plain PyTorch loads.",
    reason="Pretrained weights come from elsewhere.",
    advice="take whole tensors under the bare module's names, and divide them",
    world_sizes=_ALWAYS,
)
def _loads(bench: Bench) -> None:
    _check_loaded(bench, "none", strict=True)


@TABLE.rule(
    "STR-375",
    "Strict loading refuses a state that lacks a key, on every rank.",
    reason="A layer that keeps its random start ruins a result in silence.",
    advice="compare the keys, and raise RuntimeError",
    world_sizes=_ALWAYS,
)
def _missing(bench: Bench) -> None:
    _check_refuses(bench, "missing", strict=True)


@TABLE.rule(
    "STR-376",
    "Strict loading refuses a state that has a key too many, on every rank.",
    reason="It is another model's.",
    advice="compare the keys, and raise RuntimeError",
    world_sizes=_ALWAYS,
)
def _additional(bench: Bench) -> None:
    _check_refuses(bench, "additional", strict=True)


@TABLE.rule(
    "STR-377",
    "Loading that isn't strict takes what fits, and leaves the rest.",
    reason="Fine-tuning replaces a head.",
    advice="pass strict on",
    world_sizes=_ALWAYS,
)
def _not_strict(bench: Bench) -> None:
    _check_loaded(bench, "missing", strict=False)
    _check_loaded(bench, "additional", strict=False)


@TABLE.rule(
    "STR-378",
    "Loading refuses a tensor of another shape, strict or not, on every rank.",
    reason="Broadcasting it would load nonsense.",
    advice="compare the shapes, and raise RuntimeError",
    world_sizes=_ALWAYS,
)
def _shapes(bench: Bench) -> None:
    _check_refuses(bench, "shape", strict=True)
    _check_refuses(bench, "shape", strict=False)


def _own_parts(place: Place) -> float:
    with place.fabric() as fabric:
        model, _, _ = _set_up(fabric, Training(buffers=True), _How())
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
    world_sizes=_ALWAYS,
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
    world_sizes=_SEVERAL,
)
def _part_is_part(bench: Bench) -> None:
    for rank, (local, total) in enumerate(bench.run(_part_sizes)):
        if local >= total:
            raise Broken(f"rank {rank}'s part has {local} of {total} numbers")


def _part_sizes(place: Place) -> tuple[int, int]:
    with place.fabric() as fabric:
        model, _, _ = _set_up(fabric, Training(width=4), _How())
        state = fabric.strategy.module_state(model, False)
        total = sum(one.numel() for one in cases.build(Training(width=4)).parameters())
        return sum(getattr(one, "_local_tensor", one).numel() for one in state.values()), total


# Precision


@TABLE.rule(
    "STR-385",
    "With a scaled loss it trains as without.",
    reason="It is declared, and 16-bit training needs it.",
    advice="leave the loss and the gradients' scale alone, or take loss_scaling out of the capabilities",
    needs=("loss_scaling",),
    lacks=("sharded",),
    world_sizes=_ALWAYS,
    examples=cases.trainings(),
    count=2,
)
def _with_scaling(bench: Bench, case: Training) -> None:
    _check_training(bench, case, _How(), _scaled)


@TABLE.rule(
    "STR-389",
    "Who doesn't declare loss_scaling has a reason: a scaled loss gives other gradients than the scaled ones.",
    reason="What works must be declared: 16-bit training is refused because of it.",
    advice="declare loss_scaling",
    lacks=("loss_scaling", "sharded"),
    world_sizes=_ALWAYS,
)
def _without_scaling(bench: Bench) -> None:
    if all(_gap(got, mean) <= _EXACT for got, _, mean in bench.run(_one_pass, "scaled")):
        raise Broken("they are")


def _types(place: Place, which: str) -> tuple[Any, Any]:
    from fabric_core.conformance import references

    with place.fabric(precision=references.Mixed() if which == "mixed" else references.Full()) as fabric:
        model = cases.build(Training(), torch.float32)
        wrapped = fabric.setup_module(model)
        x, _ = next(cases.batches(Training(), torch.float32))
        y = wrapped(x.to(fabric.device))
        return model.seen[0], y.dtype


@TABLE.rule(
    "STR-386",
    "A precision's compute type holds inside the model, and its output type outside.",
    reason="Any precision works with any strategy, by its policy alone.",
    advice="carry out the policy, or leave applies_mixed_precision undeclared, and the core does it",
    world_sizes=_ALWAYS,
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
    world_sizes=_ALWAYS,
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
    world_sizes=_ALWAYS,
)
def _init(bench: Bench) -> None:
    for empty in (False, True):
        for rank, (shapes, after, raised) in enumerate(bench.run(_initialise, empty)):
            if shapes != [(2, 3), (2,)] or not after or not raised:
                raise Broken(f"rank {rank}, empty={empty}: shapes {shapes}, default device back: {after and raised}")


# Life


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
    advice="let teardown look at what there is to give back",
)
def _unconnected(bench: Bench) -> None:
    bench.run(_tear, "unconnected")


@TABLE.rule(
    "STR-391",
    "`teardown` may be called twice.",
    reason="A with block and a handler may both do it.",
    advice="forget what was given back",
    world_sizes=_ALWAYS,
)
def _torn_twice(bench: Bench) -> None:
    bench.run(_tear, "twice")


def _look() -> dict[str, Any]:
    import torch.distributed as dist
    from torch.nn.modules import module

    return {
        "the process group": dist.is_initialized(),
        "environment variables": dict(os.environ),
        "the default type": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "threads": sorted(one.name for one in threading.enumerate()),
        "hooks on all modules": [
            len(getattr(module, name))
            for name in vars(module)
            if name.startswith("_global_") and name.endswith("hooks")
        ],
        "grad mode": torch.is_grad_enabled(),
    }


def _leak(place: Place) -> list[str]:
    case, before = Training(), _look()
    x, y = next(cases.batches(case))
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = _set_up(fabric, case, _How())
        fabric.backward(_loss(fabric, wrapped, _How(), case, x, y))
        stepper.step()
        sharded, device = fabric.strategy.capabilities.sharded, fabric.device
    after = _look()
    left = [name for name in before if before[name] != after[name]]
    if not sharded:
        own = _plain_gradients(case, x, y, cases.copied(model))
        model.zero_grad()
        nn.functional.mse_loss(model(x.to(device)), y.to(device)).backward()
        if not _gap(_gradients(model), own) <= _EXACT:
            left.append("what the model's own backward pass gives")
    kept = weakref.ref(model)
    del fabric, model, wrapped, stepper
    gc.collect()
    return left if kept() is None else [*left, "the model's life, which doesn't end,"]


@TABLE.rule(
    "STR-392",
    "After `teardown` nothing is left: no process group, hook, thread or environment variable, no setting changed, and "
    "no model kept.",
    reason="Another Fabric, or a plain script, goes on in the same process.",
    advice="undo in teardown what connect and setup did; take hooks off parameters, and forget modules",
    world_sizes=_ALWAYS,
)
def _leaves_nothing(bench: Bench) -> None:
    for rank, left in enumerate(bench.run(_leak)):
        if left:
            raise Broken(f"rank {rank} leaves {', '.join(left)} changed")


def _again(place: Place) -> float:
    results = [_train(place, Training(), _How()) for _ in range(2)]
    return distance(*results)


@TABLE.rule(
    "STR-393",
    "After a teardown the next Fabric of the process works as the first did.",
    reason="Notebooks, sweeps and tests make many.",
    advice="keep no state on the class, and give everything back",
    world_sizes=_ALWAYS,
)
def _works_again(bench: Bench) -> None:
    off = max(bench.run(_again))
    if off != 0:
        raise Broken(f"the second training differs by {off:.3g}")


def _others_group(place: Place) -> tuple[bool, float]:
    import torch.distributed as dist

    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    own = dist.PrefixStore("the user's", store)
    dist.init_process_group("gloo", store=own, rank=place.rank, world_size=place.world_size)
    _train(place, Training(steps=1), _How())
    alive = dist.is_initialized()
    total = torch.ones(1)
    if alive:
        dist.all_reduce(total)
        dist.destroy_process_group()
    return alive, total.item()


@TABLE.rule(
    "STR-394",
    "A process group that was there before is there after.",
    reason="What a script made it gives back itself.",
    advice="destroy only what connect made",
    needs=("distributed",),
    world_sizes=_ALWAYS,
)
def _leaves_others(bench: Bench) -> None:
    for rank, (alive, total) in enumerate(bench.run(_others_group)):
        if not alive or total != bench.world_size:
            raise Broken(f"rank {rank}: the group is {'gone' if not alive else 'broken'}")


def _one_fails(place: Place) -> str:
    """The last rank raises in the middle of a training; the others must not wait for ever."""
    try:
        _leave_early(place)
    except Exception as error:  # noqa: BLE001 - any will do: the rank came to an end
        outcome = type(error).__name__
    else:
        outcome = "went on"
    # A rank that ends gives back what its model holds; this one stays up for the next measurement.
    gc.collect()
    return outcome


def _leave_early(place: Place) -> None:
    case = Training()
    with place.fabric() as fabric:
        _, wrapped, (stepper,) = _set_up(fabric, case, _How())
        for index, (x, y) in enumerate(cases.batches(case, steps=4)):
            if index == 1 and place.rank == place.world_size - 1:
                raise ZeroDivisionError
            fabric.backward(_loss(fabric, wrapped, _How(), case, x, y))
            stepper.step()
            stepper.zero_grad()
        fabric.barrier()


@TABLE.rule(
    "STR-395",
    "Where one rank raises and leaves, the others raise too, instead of waiting.",
    reason="A hanging job costs as much as a training one.",
    advice="let the process group end with the rank: destroy it in teardown",
    needs=("distributed",),
    world_sizes=_SEVERAL,
)
def _errors_surface(bench: Bench) -> None:
    for rank, outcome in enumerate(bench.run(_one_fails)):
        if outcome == "went on":
            raise Broken(f"rank {rank} went on as if nothing had happened")


# The state machine


_RESUMING: Final = Script(
    acts=("pass", "clip", "step", "save", "pass", "step", "load", "pass", "step", "restart", "pass", "step")
)
"""Clips once; and what was gathered over steps, such as momentum, comes back."""

_ACTS: Final = ("pass", "pass", "apart", "step", "step", "clip", "save", "load", "restart")


def _scripts() -> "SearchStrategy[Script]":
    from hypothesis import strategies as st

    return st.builds(Script, st.integers(0, 99), st.lists(st.sampled_from(_ACTS), min_size=4, max_size=14).map(tuple))


def _perform(place: Place, script: Script, folder: str) -> Weights:  # noqa: C901 - one branch for each act
    case = Training(seed=script.seed, optimizer="momentum")
    path = Path(folder) / "state.pt"
    data = iter(cases.batches(case, steps=len(script.acts)))
    acts, saved, fresh = list(script.acts), False, True
    while True:
        with place.fabric() as fabric:
            model, wrapped, (stepper,) = _set_up(fabric, case, _How())
            state = {"model": wrapped, "optimizer": stepper}
            if not fresh and saved:
                fabric.load(path, dict(state))
            apart = False
            while acts:
                act = acts.pop(0)
                if act == "restart":
                    break
                if act in {"pass", "apart"}:
                    with fabric.no_backward_sync(wrapped, enabled=act == "apart"):
                        fabric.backward(_loss(fabric, wrapped, _How(), case, *next(data)))
                    apart = act == "apart"
                elif apart:
                    continue
                elif act == "step":
                    stepper.step()
                    stepper.zero_grad()
                elif act == "clip" and any(one.grad is not None for one in model.parameters()):
                    fabric.clip_gradients(wrapped, stepper, max_norm=0.05)
                elif act == "save":
                    fabric.save(path, state)
                    saved = True
                elif act == "load" and saved:
                    fabric.load(path, dict(state))
            else:
                return whole(fabric, model)
            fresh = False


def _performed_alone(script: Script) -> Weights:  # noqa: C901 - one branch for each act
    case = Training(seed=script.seed, optimizer="momentum")
    data = iter(cases.batches(case, steps=len(script.acts)))
    model, saved, apart = cases.build(case), b"", False
    optimizer = cases.optimizer_for(case, model.parameters())

    def load() -> None:
        weights, steps = pickle.loads(saved)  # noqa: S301 - written below
        model.load_state_dict(weights)
        optimizer.load_state_dict(steps)

    for act in script.acts:
        if act == "restart":
            model, apart = cases.build(case), False
            optimizer = cases.optimizer_for(case, model.parameters())
            if saved:
                load()
        elif act in {"pass", "apart"}:
            x, y = next(data)
            nn.functional.mse_loss(model(x), y).backward()
            apart = act == "apart"
        elif apart:
            continue
        elif act == "step":
            optimizer.step()
            optimizer.zero_grad()
        elif act == "clip" and any(one.grad is not None for one in model.parameters()):
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        elif act == "save":
            saved = pickle.dumps((model.state_dict(), optimizer.state_dict()))
        elif act == "load" and saved:
            load()
    return cases.copied(model)


@TABLE.rule(
    "STR-396",
    "Any order of passes, steps, clippings, savings, loadings and restarts ends where one process does.",
    reason="Mistakes hide between calls that each work alone.",
    advice="follow the shrunk script; what it does last is what goes wrong",
    level=Level.STOCHASTIC,
    world_sizes=_ALWAYS,
    examples=_scripts,
    count=9,
    first=(_RESUMING,),
)
def _any_order(bench: Bench, script: Script) -> None:
    expected = _performed_alone(script)
    with tempfile.TemporaryDirectory(prefix="fabric-kit-") as folder:
        for rank, got in enumerate(bench.run(_perform, script, folder)):
            off = distance(got, expected)
            if not off <= _EXACT:
                raise Broken(f"rank {rank}'s parameters differ by {off:.3g}")


TABLE.untested(
    "STR-397",
    "It trains over several nodes as on one.",
    reason="The kit runs on one machine; names, addresses and networks of several are not there to be tried.",
    advice="run the kit's cases under your cluster's launcher",
)
