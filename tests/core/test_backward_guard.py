"""A raw ``loss.backward()`` is refused where it gives wrong gradients, and nothing else is."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric, FabricModule, Precision, Strategy
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import PrecisionPolicy, StrategyCapabilities, World
from fabric_core.errors import MisuseError


class Scaling(Precision):
    """Doubles the loss, and says so."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(loss_scaling=True)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * 2


class Engine(Strategy):
    """Runs backward passes itself."""

    capabilities = StrategyCapabilities(max_world_size=1, requires_strategy_backward=True)

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        return SingleProcess()


@pytest.fixture(params=["precision", "strategy"])
def guarded(request: pytest.FixtureRequest, in_memory: dict[str, Any]) -> tuple[Fabric, FabricModule]:
    """Give a Fabric that needs its own backward, and a model."""
    given = {"precision": Scaling()} if request.param == "precision" else {"strategy": Engine()}
    fabric = Fabric(**{**in_memory, **given})
    return fabric, fabric.setup(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))


X = torch.arange(6.0).reshape(2, 3)


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    """Give the gradients of all parameters."""
    return [parameter.grad for parameter in model.parameters()]


def test_a_raw_backward_is_refused_before_it_adds_anything(guarded: tuple[Fabric, FabricModule]) -> None:
    """The error says what to write, and no gradient is there."""
    _, model = guarded
    with pytest.raises(MisuseError, match=r"fabric\.backward\(loss\)"):
        model(X).sum().backward()
    assert gradients(model) == [None, None]


def test_it_is_refused_on_a_marked_method_and_a_nested_output(in_memory: dict[str, Any]) -> None:
    """Every tensor of every output of every routed method is watched."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"a": 1, "b": [self.layer(x)]}

        def training_step(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).sum()  # type: ignore[no-any-return]

    model = Fabric(**{**in_memory, "precision": Scaling()}).setup(Net())
    with pytest.raises(MisuseError):
        model(X)["b"][0].sum().backward()
    with pytest.raises(MisuseError):
        model.training_step(X).backward()


def test_fabric_backward_passes(guarded: tuple[Fabric, FabricModule]) -> None:
    """The right call gives gradients, again and again, and closes behind itself."""
    fabric, model = guarded
    for _ in range(2):
        fabric.backward(model(X).sum())
    assert all(gradient is not None for gradient in gradients(model))
    with pytest.raises(MisuseError):
        model(X).sum().backward()


def test_a_failed_backward_closes_the_guard(guarded: tuple[Fabric, FabricModule]) -> None:
    """After ``fabric.backward`` raised, a raw one is still refused."""
    fabric, model = guarded
    with pytest.raises(RuntimeError, match="does not require grad"):
        fabric.backward(torch.ones(()))
    with pytest.raises(MisuseError):
        model(X).sum().backward()


def _double(model: FabricModule) -> Any:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.pow(2).sum(), list(model.parameters()), allow_unused=True)


# torch.func compiles scripts of its own; the category of what PyTorch says to that changes with its release.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    "use",
    [
        lambda model: torch.autograd.grad(model(X).sum(), list(model.parameters())),
        _double,
        lambda model: torch.autograd.functional.jacobian(model, X),
        lambda model: torch.func.jacrev(model)(X),
        lambda model: torch.func.jacfwd(model)(X),
        lambda model: torch.func.grad(lambda x: model(x).sum())(X),
        lambda model: torch.func.vmap(model)(X),
        lambda model: torch.func.hessian(lambda x: model(x).sum())(X),
        lambda model: torch.func.functional_call(model, dict(model.named_parameters()), (X,)),
    ],
    ids=["grad", "double", "jacobian", "jacrev", "jacfwd", "func.grad", "vmap", "hessian", "functional_call"],
)
def test_other_derivatives_are_not_disturbed(
    guarded: tuple[Fabric, FabricModule], use: Callable[[nn.Module], Any]
) -> None:
    """They give what the bare model gives, and leave no gradient behind."""
    _, model = guarded
    torch.testing.assert_close(use(model), use(model.module))
    assert gradients(model) == [None, None]


def test_an_output_may_be_changed_in_place(in_memory: dict[str, Any]) -> None:
    """Watched outputs are no views: in-place changes and retained gradients work as on the bare model's."""
    fabric = Fabric(**{**in_memory, "precision": Scaling()})
    model = fabric.setup(nn.Linear(3, 1, bias=False))
    output = model(X)
    output.retain_grad()
    fabric.backward(output.mul_(3).sum())
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, 2 * 3 * X.sum(0, keepdim=True))


def test_another_models_backward_is_not_disturbed(guarded: tuple[Fabric, FabricModule]) -> None:
    """A bare model, one of another Fabric, and one whose parameters are frozen go through."""
    _, model = guarded
    bare = nn.Linear(3, 1)
    bare(X).sum().backward()
    model.requires_grad_(False)
    model(bare(X).expand(2, 3)).sum().backward()
    assert gradients(model) == [None, None]
    assert bare.weight.grad is not None


def test_what_is_frozen_at_setup_is_watched_when_it_is_trained(guarded: tuple[Fabric, FabricModule]) -> None:
    """Setup leaves it frozen; once it is thawed, a raw backward is refused before it has a gradient."""
    fabric, _ = guarded
    net = nn.Linear(3, 1)
    net.weight.requires_grad_(False)
    model = fabric.setup(net)
    assert [one.requires_grad for one in net.parameters()] == [False, True]
    net.requires_grad_(False)
    net.weight.requires_grad_(True)
    with pytest.raises(MisuseError):
        model(X).sum().backward()
    assert gradients(model) == [None, None]


def test_another_threads_backward_is_not_disturbed(guarded: tuple[Fabric, FabricModule]) -> None:
    """While this thread holds a graph of a watched model, another thread trains a bare one."""
    _, model = guarded
    output = model(X)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            bare = nn.Linear(3, 1)
            bare(X).sum().backward()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
    assert output.requires_grad


def test_nothing_is_hung_on_anything(guarded: tuple[Fabric, FabricModule]) -> None:
    """Neither outputs nor parameters carry a hook, however many calls there were."""
    fabric, model = guarded
    for _ in range(5):
        output = model(X)
        assert not output._backward_hooks
        fabric.backward(output.sum())
    for parameter in model.parameters():
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks


def test_where_nothing_needs_it_there_is_no_guard(in_memory: dict[str, Any]) -> None:
    """Outputs are the model's own, and a raw backward works."""
    model = Fabric(**in_memory).setup(nn.Linear(3, 1))
    output = model(X)
    assert output.grad_fn.name() == model.module(X).grad_fn.name()
    output.sum().backward()
    assert model.weight.grad is not None


def test_without_gradients_outputs_are_left_alone(guarded: tuple[Fabric, FabricModule]) -> None:
    """Under ``no_grad`` nothing is tied to a graph."""
    _, model = guarded
    with torch.no_grad():
        assert model(X).grad_fn is None
