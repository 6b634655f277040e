"""Measurements that several rules of strategies share. Each runs on every rank; what it returns goes to the driver."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training, Weights, distance, part
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken
from fabric_core.errors import MisuseError
from fabric_core.wrapping.module import strategy_module

ALWAYS: Final = (1, 2)


SEVERAL: Final = (2,)


SCALE: Final = 1024.0


def whole(fabric: Any, model: nn.Module) -> Weights:
    """Give a model's whole tensors: gathered by DTensor itself, not by the plugin."""
    state: dict[str, Any] = model.state_dict()
    if fabric.strategy.capabilities.sharded and not any(is_dtensor(value) for value in state.values()):
        state = fabric.strategy.module_state(model, True)
    return {name: full(value) for name, value in state.items()}


def is_dtensor(value: Any) -> bool:
    """Say whether a value is spread over ranks."""
    return callable(getattr(value, "full_tensor", None))


def full(value: Any) -> torch.Tensor:
    """Copy a tensor, whole, to the CPU."""
    tensor: torch.Tensor = value.full_tensor() if is_dtensor(value) else value
    return tensor.detach().clone().cpu()


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Give the whole gradients of what is trained."""
    return {
        name: None if parameter.grad is None else full(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@dataclass(frozen=True)
class How:
    """How a script trains: by which method, with the optimizer made when, and so on."""

    method: str = "forward"
    marked: bool = True
    optimizer: str = "with"
    apart: bool = False
    unequal_start: bool = False
    several_optimizers: bool = False


def set_up_module(fabric: Any, model: nn.Module) -> Any:
    """Set a model up alone; under ``joint_setup`` with an optimizer, where there is something to train."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if fabric.strategy.capabilities.joint_setup and trained:
        return fabric.setup(model, torch.optim.SGD(trained, lr=0.1))[0]
    return fabric.setup_module(model)


def set_up(fabric: Any, case: Training, how: How) -> tuple[cases.Net, Any, list[Any]]:
    """Make a model and its optimizers and set them up; give the model, what came of it, and the optimizers."""
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


def shard_of(fabric: Any) -> tuple[int, int]:
    """Say which part of each batch this rank trains on, where a rule compares with one process that has it all.

    Under a strategy that isn't synchronous every rank has it all, too: ranks that see the same data train as one,
    however their models are brought together.
    """
    shard: tuple[int, int] = fabric.strategy.data_shard()
    return shard if fabric.strategy.capabilities.synchronous else (0, 1)


def loss_of(fabric: Any, wrapped: Any, how: How, case: Training, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Run this rank's part of a batch."""
    shard = shard_of(fabric)
    x, y = (part(one, shard).to(fabric.device) for one in (x, y))
    if how.method == "forward":
        return nn.functional.mse_loss(wrapped(x), y) / case.accumulate
    loss: torch.Tensor = getattr(wrapped, how.method)(x, y) / case.accumulate
    return loss


def train(place: Place, case: Training, how: How, **parts: Any) -> Weights:
    """Train as a user's script does; give the whole model."""
    with place.fabric(**parts) as fabric:
        model, wrapped, steppers = set_up(fabric, case, how)
        if how.method != "forward" and how.marked:
            wrapped.mark_forward_method(how.method)
        for index, (x, y) in enumerate(cases.batches(case)):
            last = (index + 1) % case.accumulate == 0
            with fabric.no_backward_sync(wrapped, enabled=how.apart and not last):
                fabric.backward(loss_of(fabric, wrapped, how, case, x, y))
            if last:
                for stepper in steppers:
                    stepper.step()
                    stepper.zero_grad()
        return whole(fabric, model)


def check_training(bench: Bench, case: Training, how: How, measure: Callable[..., Weights] = train) -> None:
    """Compare a training on every rank with one process of plain PyTorch."""
    expected = cases.trained_alone(case)
    arguments = (case, how) if measure is train else (case,)
    for rank, got in enumerate(bench.run(measure, *arguments)):
        off = distance(got, expected)
        if not off <= exact():
            raise Broken(f"rank {rank}'s parameters differ by {off:.3g} after {case.steps} steps")


def one_pass(place: Place, mode: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Run one backward pass in one of several ways; give the gradients, this rank's own, and the mean.

    The gradients are those that a step sees, as far as its length tells; those of ``"apart"`` are looked at inside
    the context.
    """
    case = Training(rows=2)
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = set_up(fabric, case, How())
        (x, y), (again, target) = cases.batches(case)
        shard = shard_of(fabric)
        if mode == "raises":
            with contextlib.suppress(ZeroDivisionError), fabric.no_backward_sync(wrapped):
                raise ZeroDivisionError
            fabric.backward(loss_of(fabric, wrapped, How(), case, again, target))
            stepper.step()
            stepper.zero_grad()
        before = whole(fabric, model)
        if mode == "inner":
            inner, mine = strategy_module(wrapped), part(x, shard).to(fabric.device)
            out = inner("forward", mine) if fabric.strategy.capabilities.intercepts_forward else inner(mine)
            nn.functional.mse_loss(out, part(y, shard).to(fabric.device)).backward()
        elif mode == "raw":
            loss_of(fabric, wrapped, How(), case, x, y).backward()
        else:
            inside = fabric.no_backward_sync(wrapped, enabled=mode in {"apart", "undeclared"})
            with inside if mode != "raises" else contextlib.nullcontext():
                fabric.backward(loss_of(fabric, wrapped, How(), case, x, y) * (SCALE if mode == "scaled" else 1.0))
        got = local(model) if mode == "apart" else stepped(fabric, model, stepper, before)
    if mode == "scaled":
        got = {name: None if one is None else one / SCALE for name, one in got.items()}
    mean = plain_gradients(case, x, y, before)
    if mode == "apart":
        mean = {name: one if one is None else _part_like(one, model.get_parameter(name)) for name, one in mean.items()}
    return got, plain_gradients(case, part(x, shard), part(y, shard), before), mean


def _part_like(whole: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Give this rank's part of a whole tensor, where the parameter is a DTensor."""
    if not is_dtensor(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    own: torch.Tensor = distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None).to_local()
    return own.cpu()


def stepped(fabric: Any, model: nn.Module, stepper: Any, before: Weights) -> dict[str, Any]:
    """Step at a rate of one, without momentum, and give how far each parameter went: its gradient."""
    for group in stepper.param_groups:
        group.update(lr=1.0, momentum=0.0)
    try:
        stepper.step()
    except MisuseError:  # the gradients are no ranks' mean, and the core says so
        return {name: None for name, one in model.named_parameters() if one.requires_grad}
    after = whole(fabric, model)
    return {name: before[name] - after[name] for name, one in model.named_parameters() if one.requires_grad}


def local(model: nn.Module) -> dict[str, Any]:
    """Give the gradients without a collective: inside the context ranks may have none."""
    return {
        name: None if one.grad is None else local_part(one.grad).detach().clone().cpu()
        for name, one in model.named_parameters()
    }


def plain_gradients(case: Training, x: torch.Tensor, y: torch.Tensor, start: Weights | None = None) -> dict[str, Any]:
    """Give the gradients that plain PyTorch has."""
    plain = cases.build(case)
    if start is not None:
        plain.load_state_dict(start)
    nn.functional.mse_loss(plain(x), y).backward()
    return gradients(plain)


def gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Give the largest difference of gradients; infinite where one is missing."""
    if any(value is None for value in one.values()):
        return float("inf")
    return distance(one, other)


def check_mean(bench: Bench, mode: str) -> None:
    """Compare the gradients that every rank steps with to the mean."""
    for rank, (got, _, mean) in enumerate(bench.run(one_pass, mode)):
        if not gap(got, mean) <= exact():
            raise Broken(f"rank {rank}'s gradients are off the mean by {gap(got, mean):.3g}")


def refused(error: Exception) -> str:
    """Say how a rank came to an error: by its own refusal, or as one that others left alone."""
    text = str(error)
    alone = any(sign in text for sign in ("onnection closed by peer", "onnection reset", "imed out"))
    return f"{'lost' if alone else 'refused'}: {type(error).__name__}: {text}"


def local_part(tensor: Any) -> Any:
    """Give this rank's own part of a DTensor, in its memory; any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
