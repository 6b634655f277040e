"""Whatever a script does between two steps, an optimizer steps on what the model computes with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool, RankRaised

STRATEGIES = ["fsdp", "fsdp:auto_wrap_policy=null", "fsdp:reshard_after_forward=false"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.tanh(self.inner(x))
        return y


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 2)).double()


def _x(fabric: Fabric | None = None) -> torch.Tensor:
    """(batch, features), or this rank's part of it."""
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x if fabric is None else x[fabric.global_rank :: fabric.world_size]


def _train(
    model: Any, optimizer: Any, x: torch.Tensor, backward: Callable[[torch.Tensor], Any], kind: str
) -> list[torch.Tensor]:
    """Train three steps; every forward pass beyond the first changes nothing in plain PyTorch."""
    losses = []

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(x).square().mean()
        backward(loss)
        if kind == "loss dropped":
            model(x)
        else:
            with torch.no_grad():
                model(x)
        return loss

    for _ in range(3):
        if kind in {"closure", "lbfgs"}:
            losses.append(optimizer.step(evaluate))
        else:
            losses.append(evaluate())
            optimizer.step()
    with torch.no_grad():
        return [*(loss.detach() for loss in losses), model(x).square().mean()]


def _optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "lbfgs":
        return torch.optim.LBFGS(model.parameters(), max_iter=4)
    return torch.optim.SGD(model.parameters(), lr=1.0)


def _sharded(strategy: str, kind: str) -> list[float]:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        model = _model()
        wrapped, optimizer = fabric.setup(model, _optimizer(model, kind))
        # LBFGS looks at the loss itself, so its ranks must all have the whole batch.
        x = _x() if kind == "lbfgs" else _x(fabric)
        return [fabric.all_reduce(loss).item() for loss in _train(wrapped, optimizer, x, fabric.backward, kind)]


@pytest.mark.parametrize("kind", ["evaluation", "loss dropped", "closure", "lbfgs"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_forward_pass_before_the_step(strategy: str, kind: str, two_ranks: RankPool) -> None:
    """A pass between ``backward`` and the step leaves nothing behind: the next one sees the new parameters."""
    model = _model()
    expected = _train(model, _optimizer(model, kind), _x(), torch.autograd.backward, kind)
    assert expected[-1] < expected[0] / 4
    for got in two_ranks.run(_sharded, strategy, kind):
        assert got == pytest.approx([one.item() for one in expected], rel=1e-9)


def _held(inside: bool) -> None:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        model = _model()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
        with fabric.no_backward_sync(wrapped):
            fabric.backward(wrapped(_x(fabric)).square().mean())
            if inside:
                optimizer.step()
        optimizer.step()


@pytest.mark.parametrize("inside", [True, False])
def test_a_step_on_unsynchronized_gradients_is_refused(inside: bool, two_ranks: RankPool) -> None:
    """It would train nothing; the error says what is missing."""
    with pytest.raises(RankRaised, match=r"SGD\.step[\s\S]*outside fabric\.no_backward_sync"):
        two_ranks.run(_held, inside)


def _unused() -> None:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
        used, unused = (torch.optim.SGD(part.parameters(), lr=1.0) for part in model)
        wrapped = fabric.setup_module(First(model))
        first, second = fabric.setup_optimizers(used, unused)
        for apart in (True, False):
            with fabric.no_backward_sync(wrapped, enabled=apart):
                fabric.backward(wrapped(_x(fabric)).square().mean())
        second.step()
        first.step()


class First(nn.Module):
    def __init__(self, parts: nn.ModuleList) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.parts[0](x)
        return y


def test_an_optimizer_without_gradients_may_step_after_accumulation(two_ranks: RankPool) -> None:
    """That a part of the model was not used is no sign of unsynchronized gradients."""
    two_ranks.run(_unused)
