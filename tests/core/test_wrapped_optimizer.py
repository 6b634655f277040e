"""A wrapped optimizer is the original, but for how it steps."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

from fabric_core import Fabric, FabricOptimizer, Precision
from fabric_core.contracts import PrecisionPolicy


class Skipping(Precision):
    """Skips every second step."""

    count = 0

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy()

    def optimizer_step(self, optimizer: Optimizer, step: Callable[[Any], Any], closure: Any) -> Any:
        self.count += 1
        return step(closure) if self.count % 2 else None


class Own(SGD):
    """A user's optimizer with a property and a method of its own."""

    @property
    def rate(self) -> float:
        return float(self.param_groups[0]["lr"])

    @rate.setter
    def rate(self, value: float) -> None:
        for group in self.param_groups:
            group["lr"] = value

    def halve(self) -> "Own":
        self.rate /= 2
        return self


def make(in_memory: dict[str, Any], kind: type[Any] = SGD, **given: Any) -> tuple[Any, Any, nn.Linear]:
    """Give a wrapped optimizer, the original, and its model."""
    net = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(net.weight)
    optimizer = kind(net.parameters(), lr=1.0)
    return Fabric(**{**in_memory, **given}).setup(net, optimizer)[1], optimizer, net


def give_gradients(net: nn.Linear) -> None:
    """Set a gradient of ones."""
    net.weight.grad = torch.ones_like(net.weight)


def test_it_is_of_the_originals_class(in_memory: dict[str, Any]) -> None:
    """It is a ``FabricOptimizer`` and an instance of the original's class, and gives the original back."""
    optimizer, original, _ = make(in_memory, Adam)
    assert isinstance(optimizer, FabricOptimizer)
    assert isinstance(optimizer, Adam)
    assert optimizer.optimizer is original


def test_state_groups_and_attributes_are_the_originals(in_memory: dict[str, Any]) -> None:
    """What is read is the original's own object; what is written, added or deleted reaches it."""
    optimizer, original, net = make(in_memory, Own)
    assert optimizer.state is original.state
    assert optimizer.param_groups is original.param_groups
    optimizer.param_groups[0]["lr"] = 0.5
    assert original.rate == 0.5
    optimizer.rate = 0.25
    assert original.param_groups[0]["lr"] == 0.25
    optimizer.halve()
    assert optimizer.rate == 0.125
    optimizer.note = "mine"
    assert original.note == "mine"
    del optimizer.note
    assert not hasattr(original, "note")
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert len(original.param_groups) == 2
    give_gradients(net)
    optimizer.zero_grad()
    assert net.weight.grad is None
    optimizer.load_state_dict({**original.state_dict()})
    assert optimizer.state_dict() == original.state_dict()
    assert "Own" in repr(optimizer)
    assert set(dir(original)) <= set(dir(optimizer))


def test_a_step_steps_the_original(in_memory: dict[str, Any]) -> None:
    """Without and with a closure, which is evaluated with gradients and whose loss comes back."""
    optimizer, _, net = make(in_memory)
    give_gradients(net)
    assert optimizer.step() is None
    assert torch.equal(net.weight, torch.full((1, 2), -1.0))

    def closure() -> Any:
        optimizer.zero_grad()
        loss = net(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == -2.0
    assert torch.equal(net.weight, torch.full((1, 2), -2.0))


def test_the_precision_decides_on_a_step(in_memory: dict[str, Any]) -> None:
    """A precision that skips a step has its way, and its ``None`` comes back."""
    optimizer, _, net = make(in_memory, precision=Skipping())
    for expected in (-1.0, -1.0, -2.0):
        give_gradients(net)
        optimizer.step()
        assert net.weight[0, 0].item() == expected


@pytest.mark.parametrize("which", ["wrapped", "raw", "before"])
@pytest.mark.parametrize("make_scheduler", [lambda one: StepLR(one, 1, 0.5), lambda one: ReduceLROnPlateau(one, "max")])
def test_schedulers_take_either(
    in_memory: dict[str, Any], which: str, make_scheduler: Callable[[Any], LRScheduler]
) -> None:
    """A scheduler of the wrapped, the raw, or the not yet wrapped optimizer works, and no warning says otherwise."""
    net = nn.Linear(2, 1)
    original = SGD(net.parameters(), lr=1.0)
    scheduler: Any = make_scheduler(original) if which == "before" else None
    optimizer = Fabric(**in_memory).setup(net, original)[1]
    scheduler = scheduler or make_scheduler(optimizer if which == "wrapped" else original)
    for epoch in range(15):
        give_gradients(net)
        optimizer.step()
        scheduler.step(*[0.0] if isinstance(scheduler, ReduceLROnPlateau) else [])
        if isinstance(scheduler, StepLR):
            assert original.param_groups[0]["lr"] == 0.5 ** (epoch + 1)
    assert optimizer.param_groups[0]["lr"] < 1.0


def test_a_scheduler_comes_back_from_setup(in_memory: dict[str, Any]) -> None:
    """``setup(model, optimizer, scheduler=...)`` gives all three, the scheduler as it is."""
    net = nn.Linear(2, 1)
    original = SGD(net.parameters(), lr=1.0)
    scheduler = StepLR(original, 1)
    _, optimizer, same = Fabric(**in_memory).setup(net, original, scheduler=scheduler)
    assert same is scheduler
    assert optimizer.optimizer is original


def pickled(obj: Any) -> Any:
    """Give what comes back from a pickle."""
    return pickle.loads(pickle.dumps(obj))  # noqa: S301 - made right here


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("given", [{}, {"precision": Skipping()}])
def test_a_copy_steps_its_own_parameters(
    in_memory: dict[str, Any], copied: Callable[[Any], Any], given: dict[str, Any]
) -> None:
    """A deep copy and a pickled one have parameters, state and hyper-parameters of their own."""
    optimizer, original, net = make(in_memory, Adam, **given)
    give_gradients(net)
    optimizer.step()
    clone, model = copied((optimizer, net))
    assert isinstance(clone, FabricOptimizer)
    assert isinstance(clone, Adam)
    assert clone.optimizer is not original
    before = model.weight.detach().clone()
    assert torch.equal(before, net.weight)
    clone.param_groups[0]["lr"] = 0.125
    for _ in range(2):
        give_gradients(model)
        clone.step()
    assert not torch.equal(model.weight, before)
    assert torch.equal(net.weight, before)
    assert original.param_groups[0]["lr"] == 1.0


def test_state_follows_the_parameters(in_memory: dict[str, Any]) -> None:
    """State from steps before setup goes to the device of its parameter; a count of steps stays where it is."""
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    original = Adam([parameter], lr=1.0)
    original.state[parameter].update(step=torch.tensor(3.0), exp_avg=torch.zeros(2))
    optimizer = Fabric(**in_memory).setup_optimizers(original)
    assert {name: value.device.type for name, value in optimizer.state[parameter].items()} == {
        "step": "cpu",
        "exp_avg": "meta",
    }


def test_several_optimizers_come_back_in_order(in_memory: dict[str, Any]) -> None:
    """``setup_optimizers`` gives one, or a tuple."""
    fabric = Fabric(**in_memory)
    first, second = (SGD(nn.Linear(1, 1).parameters(), lr=rate) for rate in (1.0, 2.0))
    wrapped = fabric.setup_optimizers(first, second)
    assert [one.optimizer for one in wrapped] == [first, second]
    assert fabric.setup_optimizers(SGD(nn.Linear(1, 1).parameters(), lr=1.0)).param_groups[0]["lr"] == 1.0


def test_step_hooks_fire_once(in_memory: dict[str, Any]) -> None:
    """Hooks that are registered on the wrapper are the original's, and fire once for a step."""
    optimizer, original, net = make(in_memory)
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda one, *_: seen.append(one))
    give_gradients(net)
    optimizer.step()
    assert seen == [original]
