"""Steps that go round ``Fabric`` where the precision scales the loss, and whose permission a backward pass is."""

import gc
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizers

from fabric_core import Fabric, Precision
from fabric_core.contracts import PrecisionPolicy
from fabric_core.errors import MisuseError
from fabric_core.wrapping.backward_guard import BackwardPass, running_pass


class Doubling(Precision):
    """Scales the loss by two, and divides gradients by two before each step."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(loss_scaling=True)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * 2

    def optimizer_step(self, optimizer: Any, step: Any, closure: Any) -> Any:
        if closure is not None:
            closure()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= 2
        return step(None)


X = torch.ones(2, 3)


@pytest.fixture
def fabric(in_memory: dict[str, Any]) -> Fabric:
    """Give a Fabric that scales the loss."""
    return Fabric(**{**in_memory, "precision": Doubling()})


def prepared(fabric: Fabric) -> tuple[Any, Any, nn.Linear, torch.optim.Optimizer]:
    """Set up a model and its optimizer; gives them raw too."""
    net = nn.Linear(3, 1)
    raw = torch.optim.SGD(net.parameters(), lr=1.0)
    return (*fabric.setup(net, raw), net, raw)


@pytest.mark.parametrize("which", ["set up", "never set up"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_direct_step_on_scaled_gradients_is_refused(fabric: Fabric, which: str, closure: bool) -> None:
    """It raises before anything changes, with and without a closure."""
    model, _, net, raw = prepared(fabric)
    optimizer = raw if which == "set up" else torch.optim.SGD(net.parameters(), lr=1.0)
    before = net.weight.detach().clone()

    def evaluate() -> Any:
        loss = model(X).sum()
        fabric.backward(loss)
        return loss

    if not closure:
        evaluate()
    with pytest.raises(MisuseError, match=r"called directly, and the precision scales the loss[\s\S]*weight, bias"):
        optimizer.step(evaluate) if closure else optimizer.step()
    assert torch.equal(net.weight, before)


def test_what_is_not_scaled_steps_directly(fabric: Fabric) -> None:
    """Gradients computed without ``backward``, cleared ones, and those of another model are nobody's business."""
    model, optimizer, net, raw = prepared(fabric)
    for clear in (optimizer.zero_grad, model.zero_grad):
        fabric.backward(model(X).sum())
        clear()
        net.weight.grad = torch.ones_like(net.weight)
        raw.step()
        raw.zero_grad()
    other = nn.Linear(3, 1)
    other(X).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()


def test_parameters_outside_any_model_are_watched_with_their_optimizer(fabric: Fabric) -> None:
    """A raw backward and a raw step are refused for them too."""
    scale = nn.Parameter(torch.ones(()))
    raw = torch.optim.SGD([scale], lr=1.0)
    optimizer = fabric.setup_optimizers(raw)
    with pytest.raises(MisuseError, match=r"fabric\.backward"):
        (scale * 3).backward()
    assert scale.grad is None
    fabric.backward(scale * 3)
    with pytest.raises(MisuseError, match="called directly"):
        raw.step()
    optimizer.step()
    assert scale.item() == -2.0


def test_a_raw_backward_of_the_parameters_alone_is_refused(fabric: Fabric) -> None:
    """A penalty that went through no model would be too small beside scaled gradients."""
    _, _, net, _ = prepared(fabric)
    with pytest.raises(MisuseError, match=r"loss\.backward\(\) was called directly"):
        net.weight.square().sum().backward()
    assert net.weight.grad is None


def test_the_permission_is_the_threads_own(fabric: Fabric) -> None:
    """While another thread is inside ``fabric.backward``, a raw one on this thread is refused."""
    model, _, net, _ = prepared(fabric)
    inside, refused = threading.Event(), threading.Event()

    def wait(_gradient: torch.Tensor) -> None:
        inside.set()
        assert refused.wait(10)

    output = model(X)
    output.register_hook(wait)
    thread = threading.Thread(target=fabric.backward, args=(output.sum(),))
    thread.start()
    assert inside.wait(10)
    try:
        with pytest.raises(MisuseError):
            model(X).sum().backward()
    finally:
        refused.set()
        thread.join()
    assert net.weight.grad is not None


def test_a_backward_pass_inside_another_is_known(fabric: Fabric) -> None:
    """Checkpointed parts run backward inside backward; both belong to the call."""
    from torch.utils.checkpoint import checkpoint

    net = nn.Linear(3, 1)
    model = fabric.setup(net)
    x = X.clone().requires_grad_()
    fabric.backward(checkpoint(model, x, use_reentrant=True).sum())
    assert net.weight.grad is not None


def test_calls_nest_and_end() -> None:
    """Each owner's call is found from inside, an ended one is not, and what waits for the end happens then."""
    first, second = object(), object()
    done: list[str] = []
    with BackwardPass(first):
        with BackwardPass(second):
            outer, inner = running_pass(first), running_pass(second)
            assert outer is not None
            assert inner is not None
            inner.at_end.append(lambda: done.append("end"))
        assert done == ["end"]
        assert running_pass(second) is None
        outer.at_failure.append(lambda: done.append("failure"))
    assert done == ["end"]
    assert running_pass(first) is None


def _hooks() -> Mapping[int, Any]:
    return torch_optimizers._global_optimizer_pre_hooks


def test_every_optimizer_is_watched_no_longer_than_the_fabric_lives(fabric: Fabric, in_memory: dict[str, Any]) -> None:
    """PyTorch's hook goes at teardown, or with a Fabric that nobody tore down; one that needs none sets none."""
    before = len(_hooks())
    plain = Fabric(**in_memory)
    plain.setup(nn.Linear(1, 1))
    assert len(_hooks()) == before
    prepared(fabric)
    assert len(_hooks()) == before + 1
    fabric.teardown()
    assert len(_hooks()) == before
    forgotten = Fabric(**{**in_memory, "precision": Doubling()})
    prepared(forgotten)
    assert len(_hooks()) == before + 1
    del forgotten
    gc.collect()
    assert len(_hooks()) == before


def test_a_call_that_needs_the_model_refuses_the_raw_one(fabric: Fabric) -> None:
    """Clipping takes what ``setup`` returned."""
    model, optimizer, net, _ = prepared(fabric)
    fabric.backward(model(X).sum())
    with pytest.raises(MisuseError, match="the model was not set up"):
        fabric.clip_gradients(net, optimizer, max_norm=1.0)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
