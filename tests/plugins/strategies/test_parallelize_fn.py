"""What a `parallelize_fn` may do: shard all by itself, or return another module."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import MisuseError, SetupError
from fabric_plugins.strategies import ModelParallelStrategy


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, 4) to (batch, 1)."""
        y: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return y

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """Run ``forward``, from a method."""
        return self(x).square().mean()  # type: ignore[no-any-return]

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        """Run the parts, and not ``forward``."""
        return self.second(torch.tanh(self.first(x))).square().mean()  # type: ignore[no-any-return]

    def direct(self, x: torch.Tensor) -> torch.Tensor:
        """Compute with the parameters, and run no module."""
        linear = nn.functional.linear
        inner = torch.tanh(linear(x, self.first.weight, self.first.bias))
        return linear(inner, self.second.weight, self.second.bias).square().mean()


class Converted(Net):
    """Stands for what a library that converts a model gives back: another object, with other parameters."""


def nothing(_model: nn.Module, _mesh: Any) -> None:
    """Leave it all to the strategy."""


def shard_all(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard a part, then the rest, as programs for Lightning Fabric do."""
    fully_shard(model.first, mesh=mesh["data_parallel"])  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def shard_root(model: nn.Module, mesh: Any) -> None:
    """Shard the whole model as one unit."""
    fully_shard(model, mesh=mesh["data_parallel"])


def shard_and_compile(model: nn.Module, mesh: Any) -> Any:
    """Shard, and give back a compiled module."""
    return torch.compile(shard_all(model, mesh), backend="eager")


def convert(model: nn.Module, _mesh: Any) -> nn.Module:
    """Give back a module with parameters of its own."""
    other = Converted()
    other.load_state_dict(model.state_dict())
    return other.to(next(model.parameters()).device)


def add(model: nn.Module, _mesh: Any) -> nn.Module:
    """Give back a module with one more parameter."""
    other = copy.deepcopy(model)
    other.extra = nn.Parameter(torch.ones(1))
    return other


def say(_model: nn.Module, _mesh: Any) -> Any:
    """Give back no module."""
    return "done"


def trained(how: Callable[..., Any]) -> tuple[list[torch.Tensor], str, list[str]]:
    """Train for three steps, accumulating; give the parameters, the class of the original, and the state's names."""
    torch.manual_seed(3)
    strategy = ModelParallelStrategy(parallelize_fn=how, tensor_parallel_size=1)
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        bare = Net()
        model, optimizer = fabric.setup(bare, torch.optim.Adam(bare.parameters(), lr=0.1))
        for step in range(3):
            for part in range(2):
                batch = torch.arange(8.0).reshape(2, 4) * (1 + fabric.global_rank + part + step) / 10
                with fabric.no_backward_sync(model, enabled=part == 0):
                    fabric.backward(model(batch).square().mean())
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
        values = [getattr(one, "full_tensor", one.detach)().detach().clone() for one in model.parameters()]
        return values, type(model.module).__name__, list(model.state_dict())


@pytest.mark.parametrize("how", [shard_all, shard_and_compile, convert])
def test_it_trains_as_the_strategys_own_sharding(how: Callable[..., Any], two_ranks: RankPool) -> None:
    """Whoever shards, and whatever object comes back, the parameters after some steps are the same."""
    expected = two_ranks.run(trained, nothing)
    for (values, kind, names), (reference, _, same_names) in zip(two_ranks.run(trained, how), expected, strict=True):
        assert names == same_names
        assert kind == ("Converted" if how is convert else "FSDPNet")
        for value, other in zip(values, reference, strict=True):
            torch.testing.assert_close(value, other)


def units(how: Callable[..., Any]) -> list[str]:
    """Give the names of the blocks that are sharded as units of their own."""
    strategy = ModelParallelStrategy(parallelize_fn=how, tensor_parallel_size=1)
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        model = fabric.setup(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))))
        return [name for name, one in model.module.named_modules() if name and isinstance(one, FSDPModule)]


def shard_second(model: nn.Sequential, mesh: Any) -> None:
    """Shard one block of three."""
    fully_shard(model[1], mesh=mesh["data_parallel"])


def test_blocks_are_sharded_where_the_function_shards_none(two_ranks: RankPool) -> None:
    """One that the function chose is a unit, and no other beside it."""
    assert two_ranks.run(units, nothing) == [["0", "1", "2"]] * 2
    assert two_ranks.run(units, shard_second) == [["1"]] * 2


def refused(how: Callable[..., Any]) -> str:
    """Give the error of a setup."""
    strategy = ModelParallelStrategy(parallelize_fn=how, tensor_parallel_size=1)
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        with pytest.raises(SetupError) as caught:
            fabric.setup(Net())
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "said"), [(add, "other parameters: extra"), (say, "returned a str, which is no module")]
)
def test_what_no_optimizer_would_know_is_refused(how: Callable[..., Any], said: str, two_ranks: RankPool) -> None:
    """The error names what is other, and what to give back."""
    for message in two_ranks.run(refused, how):
        assert said in message
        assert "parameters of the same names" in message


def trained_by(method: str, how: Callable[..., Any]) -> tuple[list[torch.Tensor], float, str]:
    """Train by a marked method, then evaluate by it; give the parameters, the loss, and an unmarked method's error."""
    torch.manual_seed(3)
    strategy = ModelParallelStrategy(parallelize_fn=how, tensor_parallel_size=1)
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        bare = Net()
        model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
        batch = torch.arange(8.0).reshape(2, 4) / 8
        with pytest.raises(MisuseError) as caught:
            model.parts(batch)
        model.mark_forward_method(method)
        for _ in range(3):
            for part in (0.5, 1.0):
                with fabric.no_backward_sync(model, enabled=part < 1):
                    fabric.backward(getattr(model, method)(batch * (part + fabric.global_rank)))
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            last = getattr(model, method)(batch).item()
        values = [getattr(one, "full_tensor", one.detach)().detach().clone() for one in model.parameters()]
        return values, last, str(caught.value)


@pytest.mark.parametrize(
    ("method", "how"),
    [*itertools.product(["loss", "parts"], [shard_root, shard_all, shard_and_compile]), ("direct", shard_root)],
)
def test_a_marked_method_of_a_model_that_the_function_shards(
    method: str, how: Callable[..., Any], two_ranks: RankPool
) -> None:
    """It gathers the parameters and averages their gradients, though the shards are the function's own."""
    torch.manual_seed(3)
    reference = Net()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    batch = torch.arange(8.0).reshape(2, 4) / 8
    for _ in range(3):
        for factor in (0.5, 1.0, 1.5, 2.0):
            (reference.loss(batch * factor) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for values, last, error in two_ranks.run(trained_by, method, how):
        assert "mark_forward_method('parts')" in error
        assert last == pytest.approx(reference.loss(batch).item())
        for value, other in zip(values, reference.parameters(), strict=True):
            torch.testing.assert_close(value, other.detach())
