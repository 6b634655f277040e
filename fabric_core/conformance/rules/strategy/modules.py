"""Rules for strategies: what setup makes of a module."""

from collections.abc import Iterable
from typing import Any, Final

import torch

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training, Weights, distance
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Level, Table
from fabric_core.conformance.rules.strategy.measures import (
    ALWAYS,
    SEVERAL,
    How,
    check_training,
    local_part,
    loss_of,
    set_up,
    set_up_module,
    train,
    whole,
)
from fabric_core.errors import MisuseError

TABLE: Final = Table("strategy", inside=False)


def _frozen(place: Place) -> tuple[bool, float, torch.Tensor]:
    with place.fabric() as fabric:
        model = cases.build(Training())
        model.requires_grad_(False)
        before = cases.copied(model)
        wrapped = set_up_module(fabric, model)
        x, _ = next(cases.batches(Training()))
        y = wrapped(x.to(fabric.device)).detach().cpu()
        return not y.requires_grad, distance(before, whole(fabric, model)), y


@TABLE.rule(
    "STR-312",
    "A model with nothing to train is set up, and runs.",
    reason="A teacher or a frozen encoder goes through the same setup.",
    advice="wrap it without gradients, or return it as it is",
    world_sizes=ALWAYS,
)
def _nothing_to_train(bench: Bench) -> None:
    x, _ = next(cases.batches(Training()))
    expected = cases.build(Training())(x).detach()
    for rank, (_, moved, y) in enumerate(bench.run(_frozen)):
        if moved != 0 or not torch.allclose(y, expected, rtol=0, atol=exact()):
            raise Broken(f"rank {rank} changed it by {moved}, or computes something else")


def _shape(place: Place) -> dict[str, Any]:
    """Look at the user's module after setup."""
    case = Training(frozen=True, tied=True, buffers=True)
    with place.fabric() as fabric:
        state = torch.get_rng_state()
        plain, model = cases.build(case), cases.build(case)
        for one in (plain, model):
            one.inner.eval()
        wrapped = set_up_module(fabric, model)
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
            "tied": model.is_tied(),
            "patched": sorted(set(vars(model)) - set(vars(plain))) + ["forward"] * ("forward" in vars(model)),
            "types": all(one.dtype == other.dtype for (_, one), (_, other) in zip(before, after, strict=True)),
            "devices": {one.device.type for one in model.parameters()} == {fabric.device.type},
            "integers": model.counter.tolist() == [3, 5],
            "output": max((one - plain(x.cpu(), scale=2.0).detach()).abs().max().item() for one in (quiet, loud)),
            "modes": [one.training for one in model.modules()] == [one.training for one in plain.modules()],
            "random": torch.equal(state, torch.get_rng_state()),
            "local": _numbers(model.parameters()),
            "whole": _numbers(plain.parameters()),
        }


def _numbers(tensors: Iterable[Any]) -> int:
    return sum(local_part(one).numel() for one in tensors if isinstance(one, torch.Tensor))


def _check_shape(bench: Bench, key: str, detail: str) -> None:
    for rank, seen in enumerate(bench.run(_shape)):
        if seen[key] is not True:
            raise Broken(f"rank {rank}: {detail}")


@TABLE.rule(
    "STR-313",
    "After setup the user's module has the same parameters' names and the same keys.",
    reason="Checkpoints, optimizers' groups and logs name parameters.",
    advice="wrap the module; rename nothing inside",
    world_sizes=ALWAYS,
)
def _names(bench: Bench) -> None:
    _check_shape(bench, "names", "named_parameters has other names")
    _check_shape(bench, "keys", "state_dict has other keys")


@TABLE.rule(
    "STR-314",
    "After setup what was frozen is frozen, and what was shared is shared.",
    reason="Tied embeddings that come apart train two weights.",
    advice="replace a shared parameter everywhere by the same new one, and copy requires_grad",
    world_sizes=ALWAYS,
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
    world_sizes=ALWAYS,
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
    world_sizes=ALWAYS,
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
    world_sizes=ALWAYS,
)
def _same_values(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_shape)):
        if not seen["output"] <= exact():
            raise Broken(f"rank {rank}: the output differs by {seen['output']:.3g}")
    _check_shape(bench, "modes", "module.training is changed")


@TABLE.rule(
    "STR-318",
    "Setting a model up draws no random number.",
    reason="The same seed must give the same data order under every strategy.",
    advice="use a generator of your own",
    level=Level.SHOULD,
    world_sizes=ALWAYS,
)
def _draws_nothing(bench: Bench) -> None:
    _check_shape(bench, "random", "the random state is another after setup")


def _numbers_held(place: Place) -> tuple[int, int]:
    """Step with Adam; give how many numbers of parameters and optimizer state this rank holds, and of how many."""
    case = Training(optimizer="adam")
    x, y = next(cases.batches(case))
    plain = cases.build(case)
    optimizer = cases.optimizer_for(case, plain.parameters())
    torch.nn.functional.mse_loss(plain(x), y).backward()
    optimizer.step()
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = set_up(fabric, case, How())
        fabric.backward(loss_of(fabric, wrapped, How(), case, x, y))
        stepper.step()
        held, every = (
            _numbers((*one.parameters(), *(value for state in by.state.values() for value in state.values())))
            for one, by in ((model, stepper), (plain, optimizer))
        )
        return held, every


@TABLE.rule(
    "STR-319",
    "Who declares to shard keeps less than the whole of parameters and optimizer state on each rank.",
    reason="It is what a user chooses it for.",
    advice="shard in setup_module, or take sharded out of the capabilities",
    needs=("sharded",),
    world_sizes=SEVERAL,
)
def _shards(bench: Bench) -> None:
    for rank, (held, every) in enumerate(bench.run(_numbers_held)):
        if held >= every:
            raise Broken(f"rank {rank} holds {held} of {every} numbers")


@TABLE.rule(
    "STR-320",
    "Who doesn't declare to shard leaves parameters whole, as plain tensors.",
    reason="Scripts, wrappers and checkpoints look at them.",
    advice="declare sharded",
    lacks=("sharded",),
    world_sizes=SEVERAL,
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
    world_sizes=ALWAYS,
    examples=cases.trainings(buffers=False),
    count=3,
)
def _marked(bench: Bench, case: Training) -> None:
    check_training(bench, case, How(method="training_loss"))


def _unmarked(place: Place, method: str) -> str:
    try:
        train(place, Training(steps=1), How(method=method, marked=False))
    except MisuseError as error:
        return f"refused: {error.what}"
    return "ran"


@TABLE.rule(
    "STR-322",
    "Who declares intercepts_forward: a method that isn't marked is refused when it runs the model.",
    reason="It would train without synchronising, silently.",
    advice="leave submodules reachable by hooks, as nn.Module.__call__ does",
    needs=("intercepts_forward",),
    world_sizes=ALWAYS,
)
def _refuses_unmarked(bench: Bench) -> None:
    for method in ("training_loss", "first_loss"):
        for rank, outcome in enumerate(bench.run(_unmarked, method)):
            if not outcome.startswith("refused"):
                raise Broken(f"rank {rank}: the method {method} {outcome}")


@TABLE.rule(
    "STR-323",
    "Who doesn't declare intercepts_forward trains rightly through any method, marked or not.",
    reason="Undeclared, nothing refuses such a method.",
    advice="declare intercepts_forward",
    lacks=("intercepts_forward",),
    world_sizes=ALWAYS,
    examples=cases.trainings(buffers=False),
    count=3,
)
def _needs_no_mark(bench: Bench, case: Training) -> None:
    check_training(bench, case, How(method="training_loss", marked=False))


def _two_models(place: Place) -> tuple[Weights, Weights] | str:
    """Train two models in turn; while the second is trained, the first one's gradients may stay unsynchronized."""
    first, second = Training(seed=1), Training(seed=2, optimizer="adam")
    with place.fabric() as fabric:
        one = set_up(fabric, first, How())
        try:
            two = set_up(fabric, second, How())
        except (RuntimeError, ValueError) as error:
            return str(error)
        for pairs in zip(cases.batches(first), cases.batches(second), strict=True):
            for (_, wrapped, steppers), case, (x, y) in zip((one, two), (first, second), pairs, strict=True):
                with fabric.no_backward_sync(one[1], enabled=case is second):
                    fabric.backward(loss_of(fabric, wrapped, How(), case, x, y))
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
    world_sizes=ALWAYS,
)
def _several_models(bench: Bench) -> None:
    expected = (cases.trained_alone(Training(seed=1)), cases.trained_alone(Training(seed=2, optimizer="adam")))
    for rank, got in enumerate(bench.run(_two_models)):
        if isinstance(got, str):
            raise Broken(f"rank {rank} raised: {got}")
        off = max(distance(one, other) for one, other in zip(got, expected, strict=True))
        if not off <= exact():
            raise Broken(f"rank {rank}'s parameters differ by {off:.3g}")
