"""Gradients are clipped as those of the whole model are, however it is divided."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool, RankRaised
from fabric_plugins.strategies import FSDPStrategy, ModelParallelStrategy

NORMS = [0.0, 0.5, 1.0, 2.0, 3.0, math.inf]


class Model(nn.Module):
    """Has parameters with fewer rows than there are ranks, one without a gradient, and one that is a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
        self.one, self.unused = nn.Parameter(torch.ones(1, 5)), nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x))) * self.one
        return y


def spread(model: nn.Module, mesh: DeviceMesh) -> None:
    """By columns, then rows; the rest stays whole."""
    parallelize_module(model, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


STRATEGIES: dict[str, tuple[Any, int]] = {
    "single_device": ("single_device", 1),
    "ddp": ("ddp:find_unused_parameters=true", 2),
    "fsdp": ("fsdp", 4),
    "hsdp": (FSDPStrategy(replicate=2, cpu_offload=True), 4),
    "tensor": (ModelParallelStrategy(parallelize_fn=spread), 2),
    "tensor x data": (ModelParallelStrategy(parallelize_fn=spread, tensor_parallel_size=2), 4),
}


def _data() -> torch.Tensor:
    """(batch, features), with whole numbers, so that sums are exact."""
    return torch.randint(-3, 4, (8, 6), generator=torch.Generator().manual_seed(1)).double()


def _clipped(strategy: Any, devices: int, how: dict[str, Any], broken: bool) -> Any:
    """Clip once; gives the norm, and the step that the clipped gradients make."""
    with Fabric(accelerator="cpu", strategy=strategy, devices=devices) as fabric:
        fabric.launch()
        torch.manual_seed(3)
        model = Model().double()
        wrapped, one, other = fabric.setup(
            model,
            torch.optim.SGD([*model.up.parameters(), model.unused], lr=1.0),
            torch.optim.SGD([*model.down.parameters(), model.one], lr=1.0),
        )
        index, count = fabric.strategy.data_shard()
        x = _data()[index::count]
        if broken:
            x[0, 0] = float("nan")
        fabric.backward(wrapped(x).square().mean())
        norms = [fabric.clip_gradients(wrapped, optimizer, **how) for optimizer in (one, other)]
        for optimizer in (one, other):
            optimizer.step()
        for norm in norms:
            assert norm is None or (type(norm) is torch.Tensor and norm.shape == ())
        state = fabric.strategy.module_state(model, full=True)
        return [None if norm is None else norm.item() for norm in norms], {k: v.numpy() for k, v in state.items()}


def _expected(how: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    model = Model().double()
    groups = [[*model.up.parameters(), model.unused], [*model.down.parameters(), model.one]]
    torch.autograd.backward(model(_data()).square().mean())
    norms: list[float | None] = []
    for group in groups:
        if "max_norm" in how:
            norms.append(nn.utils.clip_grad_norm_(group, **how).item())
        else:
            nn.utils.clip_grad_value_(group, how["clip_val"])
            norms.append(None)
        torch.optim.SGD(group, lr=1.0).step()
    return norms, model.state_dict()


def _clip(strategy: str, how: dict[str, Any], broken: bool, pools: dict[int, RankPool]) -> list[Any]:
    chosen, devices = STRATEGIES[strategy]
    if devices == 1:
        return [_clipped(chosen, devices, how, broken)]
    return pools[devices].run(_clipped, chosen, devices, how, broken)


@pytest.mark.parametrize(
    "how",
    [*({"max_norm": 0.01, "norm_type": p} for p in NORMS), {"max_norm": 1e9}, {"clip_val": 0.003}],
    ids=str,
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_as_the_whole_model(strategy: str, how: dict[str, Any], two_ranks: RankPool, four_ranks: RankPool) -> None:
    """Each optimizer's norm, on every rank, and the clipped gradients are plain PyTorch's on the joined batch."""
    norms, state = _expected(how)
    got = _clip(strategy, how, False, {2: two_ranks, 4: four_ranks})
    for rank_norms, _ in got:
        if norms[0] is not None:
            torch.testing.assert_close(rank_norms, norms, rtol=1e-12, atol=0)
    for name, value in state.items():
        torch.testing.assert_close(torch.from_numpy(got[0][1][name]), value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_norm_that_is_not_finite(strategy: str, two_ranks: RankPool, four_ranks: RankPool) -> None:
    """It is an error on every rank by default, and comes back where that is not wanted."""
    pools = {2: two_ranks, 4: four_ranks}
    with pytest.raises((RankRaised, RuntimeError), match=r"nan|non-finite"):
        _clip(strategy, {"max_norm": 1.0}, True, pools)
    for norm_type in (2.0, math.inf):
        how = {"max_norm": 1.0, "norm_type": norm_type, "error_if_nonfinite": False}
        for norms, _ in _clip(strategy, how, True, pools):
            assert not any(math.isfinite(norm) for norm in norms)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return y


def spread_sequence(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let each rank normalise its part of the sequence, so that the norm's gradients are sums yet to be added up."""
    plan = {"norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor_parallel"], plan)
    inputs = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
    parallelize_module(model, mesh["tensor_parallel"], inputs)


def _normed() -> tuple[nn.Module, torch.Tensor]:
    """Make the model, and data of shape (batch, sequence, features)."""
    torch.manual_seed(0)
    return Normed().double(), torch.randn(2, 4, 4, dtype=torch.float64)


def _clipped_sequence(how: dict[str, Any]) -> Any:
    strategy = ModelParallelStrategy(parallelize_fn=spread_sequence)
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        model, x = _normed()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.get_submodule("norm").parameters(), lr=1.0))
        fabric.backward(wrapped(x).square().sum())
        norm = fabric.clip_gradients(wrapped, optimizer, **how)
        optimizer.step()
        state = fabric.strategy.module_state(model, full=True)
        return None if norm is None else norm.item(), {name: value.numpy() for name, value in state.items()}


@pytest.mark.parametrize(
    "how", [{"max_norm": 0.1, "norm_type": 2.0}, {"max_norm": 0.1, "norm_type": math.inf}, {"clip_val": 0.05}], ids=str
)
def test_gradients_that_are_sums_yet_to_be_added_up(how: dict[str, Any], two_ranks: RankPool) -> None:
    """What sequence parallelism leaves of a norm's gradients is added up before anybody looks at it."""
    model, x = _normed()
    parameters = [*model.get_submodule("norm").parameters()]
    torch.autograd.backward(model(x).square().sum())
    norm = None
    if "max_norm" in how:
        norm = nn.utils.clip_grad_norm_(parameters, **how).item()
    else:
        nn.utils.clip_grad_value_(parameters, how["clip_val"])
    torch.optim.SGD(parameters, lr=1.0).step()
    got = two_ranks.run(_clipped_sequence, how)
    assert [rank_norm for rank_norm, _ in got] == [norm and pytest.approx(norm, rel=1e-12)] * 2
    for name, value in model.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(got[0][1][name]), value, rtol=0, atol=1e-12, msg=name)
