"""Whatever the model, its frozen parts, the batches and the accumulation: training on two ranks is plain training."""

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool


class Layers(nn.Module):
    """Layers of given widths, in blocks where they repeat."""

    def __init__(self, widths: list[int], repeats: int) -> None:
        super().__init__()
        self.first = nn.Linear(3, widths[0])
        self.middle = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(widths[-1], widths[-1]), nn.Tanh()) for _ in range(repeats))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        for layer in self.middle:
            x = torch.tanh(layer(x))
        for block in self.blocks:
            x = x + block(x)
        return x * self.scale


def _cases() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "widths": st.lists(st.integers(1, 9), min_size=1, max_size=3),
            "repeats": st.integers(0, 3),
            "frozen": st.sets(st.integers(0, 12), max_size=6),
            # For each step the sizes of its micro-batches; rows are dealt out in turn, so ranks may have unequal parts.
            "steps": st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=3), min_size=1, max_size=3),
        }
    )


def _model(case: dict[str, Any]) -> nn.Module:
    torch.manual_seed(5)
    model = Layers(case["widths"], case["repeats"]).double()
    for number, parameter in enumerate(list(model.parameters())[:-1]):
        parameter.requires_grad_(number not in case["frozen"])
    model.scale.requires_grad_()
    return model


def _data(step: int, number: int, size: int) -> torch.Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(100 * step + number), dtype=torch.float64)


def _train(case: dict[str, Any], strategy: str) -> Any:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        model = _model(case)
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
        for step, sizes in enumerate(case["steps"]):
            for number, size in enumerate(sizes):
                own = _data(step, number, size)[fabric.global_rank :: 2]
                with fabric.no_backward_sync(wrapped, enabled=number + 1 < len(sizes)):
                    # The mean over all rows is the ranks' average of sums times ranks over rows.
                    fabric.backward(wrapped(own).square().sum() * 2 / size)
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.numpy() for name, value in fabric.strategy.module_state(model, full=True).items()}


def _plainly(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = _model(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step, sizes in enumerate(case["steps"]):
        for number, size in enumerate(sizes):
            torch.autograd.backward(model(_data(step, number, size)).square().sum() / size)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_any_model(strategy: str, two_ranks: RankPool) -> None:
    """In float64 the parameters agree to 1e-10 with plain PyTorch's on the joined batch."""

    @settings(max_examples=25, derandomize=True, deadline=None, database=None)
    @given(case=_cases())
    def agrees(case: dict[str, Any]) -> None:
        expected = _plainly(case)
        got = two_ranks.run(_train, case, strategy)[0]
        assert set(got) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(torch.from_numpy(got[name]), value, rtol=1e-10, atol=1e-10, msg=name)

    agrees()
