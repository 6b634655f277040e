"""The extension ``nan_guard`` names what made the first number that is not finite, and leaves nothing behind."""

import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fabric_nan_guard import NaNGuard, NotFiniteError
from torch import nn
from torch.nn.modules import module as torch_module

from fabric_core import Fabric
from fabric_core.conformance import RankPool


class Log(nn.Module):
    """Has no finite value where its input is not positive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take the logarithm."""
        return torch.log(x)


class Root(nn.Module):
    """Has a value at zero, and no derivative."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take the root of the square."""
        return torch.sqrt(x * x)


class Net(nn.Module):
    """Three layers, the second of which is to be planted."""

    def __init__(self, planted: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 2)
        self.planted = planted
        self.head = nn.Sequential(nn.Linear(2, 2), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run one after the other."""
        y: torch.Tensor = self.head(self.planted(self.encoder(x)))
        return y


def _run(planted: nn.Module, x: torch.Tensor, **parts: Any) -> str:
    """Train one step; give the name of the module that was found, or nothing."""
    torch.manual_seed(0)
    model = Net(planted)
    with torch.no_grad():
        model.encoder.weight.copy_(torch.eye(2))
        model.encoder.bias.zero_()
    with Fabric(**{"accelerator": "cpu", "devices": 1, **parts}, plugins=[NaNGuard()]) as fabric:
        fabric.launch()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        try:
            fabric.backward(wrapped(x).sum())
            optimizer.step()
        except NotFiniteError as error:
            return str(error.fields["module"])
    return ""


POSITIVE = torch.tensor([[1.0, 2.0]])
NEGATIVE = torch.tensor([[-1.0, 2.0]])
ZERO = torch.tensor([[0.0, 2.0]])


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Give two ranks."""
    with RankPool(2) as pool:
        yield pool


def test_what_is_finite_passes() -> None:
    """A sound model trains."""
    assert not _run(Log(), POSITIVE)


def test_the_first_output_names_its_module() -> None:
    """Everything after the planted module is not finite either; the planted one is named."""
    assert _run(Log(), NEGATIVE) == "planted (Log)"


def test_the_first_gradient_names_its_module() -> None:
    """A derivative at zero is infinite; the module that has it is named, not the one that it comes to."""
    assert _run(Root(), ZERO) == "planted (Root)"


def test_an_input_that_is_not_finite_is_told_apart() -> None:
    """The message says that the fault lies before the module."""
    model = nn.Linear(2, 2)
    with Fabric(accelerator="cpu", devices=1, plugins=[NaNGuard()]) as fabric:
        wrapped = fabric.setup(model)
        with pytest.raises(ArithmeticError, match=r"the model itself \(Linear\) is not finite, and its input was not"):
            wrapped(torch.tensor([[float("nan"), 0.0]]))


def test_a_gradient_of_parameters_alone_names_the_parameter() -> None:
    """What was planted into a gradient after the backward pass is found before the step."""
    model = Net(nn.Tanh())
    with Fabric(accelerator="cpu", devices=1, plugins=[NaNGuard()]) as fabric:
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        fabric.backward(wrapped(POSITIVE).sum())
        assert model.encoder.weight.grad is not None
        model.encoder.weight.grad[0, 0] = float("inf")
        with pytest.raises(NotFiniteError, match=r"parameter encoder\.weight is not finite"):
            optimizer.step()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_it_finds_under_strategies(ranks: RankPool, strategy: str) -> None:
    """On every rank, in whole models and in shards."""
    for planted, x, name in ((Log(), NEGATIVE, "planted (Log)"), (Root(), ZERO, "planted (Root)")):
        assert ranks.run(_on_two, strategy, planted, x) == [name, name]


def _on_two(strategy: str, planted: nn.Module, x: torch.Tensor) -> str:
    return _run(planted, x, strategy=strategy, devices=2)


def test_overflows_that_the_precision_skips_are_none() -> None:
    """Under a scaled loss an infinite gradient is skipped, as without the extension."""
    assert not _run(Root(), ZERO, precision="16-mixed")
    assert _run(Log(), NEGATIVE, precision="16-mixed") == "planted (Log)"


def test_nothing_is_left() -> None:
    """The hook goes with the ``Fabric``, torn down or not, and the model copies and pickles meanwhile."""
    before = len(torch_module._global_forward_hooks)
    model = Net(nn.Tanh())
    with Fabric(accelerator="cpu", devices=1, plugins=[NaNGuard()]) as fabric:
        fabric.setup(model)
        assert len(torch_module._global_forward_hooks) == before + 1
        copy.deepcopy(model)
        pickle.loads(pickle.dumps(model))
    assert len(torch_module._global_forward_hooks) == before
    Fabric(accelerator="cpu", devices=1, plugins=[NaNGuard()]).setup(Net(nn.Tanh()))
    gc.collect()
    assert len(torch_module._global_forward_hooks) == before
