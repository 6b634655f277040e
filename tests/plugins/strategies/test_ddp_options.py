"""Every option of ``ddp`` does what it says, seen from outside of PyTorch's DDP."""

import copy
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool, RankRaised
from fabric_core.errors import MisuseError


def _storages(options: str) -> int:
    with Fabric(accelerator="cpu", strategy=f"ddp:{options}", devices=2) as fabric:
        fabric.launch()
        raw = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        model = fabric.setup(raw)
        for _ in range(2):  # DDP divides anew once it has seen the order in which gradients come
            raw.zero_grad(set_to_none=True)
            fabric.backward(model(torch.ones(1, 8)).sum())
        grads = [parameter.grad for parameter in raw.parameters()]
        return len({grad.untyped_storage().data_ptr() for grad in grads if grad is not None})


@pytest.mark.parametrize(
    ("options", "storages"),
    [
        ("gradient_as_bucket_view=true", 1),
        ("gradient_as_bucket_view=false", 6),
        ("gradient_as_bucket_view=true,bucket_cap_mb=0.00025", 3),
    ],
)
def test_gradients_lie_in_buckets(options: str, storages: int, two_ranks: RankPool) -> None:
    """As views, all gradients of a bucket share memory: one, or one for each layer; else none do."""
    assert two_ranks.run(_storages, options) == [storages, storages]


class _Branches(nn.Module):
    """Uses its second branch only where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 1)
        self.second = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, second: bool) -> torch.Tensor:
        y: torch.Tensor = (self.second if second else self.first)(x)
        return y


def _branches(options: str, use: list[bool]) -> Any:
    with Fabric(accelerator="cpu", strategy=f"ddp:{options}", devices=2) as fabric:
        fabric.launch()
        torch.manual_seed(0)
        raw = _Branches()
        model = fabric.setup(raw)
        for second in use:
            raw.zero_grad(set_to_none=True)
            fabric.backward(model(torch.full((1, 3), fabric.global_rank + 1.0), second).sum())
        return [None if one.grad is None else one.grad.flatten().tolist() for one in raw.parameters()]


@pytest.mark.parametrize(
    ("options", "use", "right"),
    [
        ("find_unused_parameters=false", [False, False], False),
        ("find_unused_parameters=true", [False, True], True),
        ("static_graph=true", [False, False], True),
    ],
)
def test_unused_parameters(options: str, use: list[bool], right: bool, two_ranks: RankPool) -> None:
    """An unused parameter is an error, unless it is looked for, or the graph is declared to be always the same."""
    if not right:
        with pytest.raises(RankRaised, match="find_unused_parameters=True"):
            two_ranks.run(_branches, options, use)
        return
    for grads in two_ranks.run(_branches, options, use):
        used, unused = (grads[2:], grads[:2]) if use[-1] else (grads[:2], grads[2:])
        assert used == [[1.5, 1.5, 1.5], [1.0]]
        assert unused == [None, None]


def _round_the_output(which: str) -> str:
    """Train a part by what a hook saw, so that PyTorch reduces nothing; give the error of the step."""
    with Fabric(accelerator="cpu", strategy="ddp:static_graph=true", devices=2) as fabric:
        fabric.launch()
        raw = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        model, optimizer = fabric.setup(raw, torch.optim.SGD(raw.parameters(), lr=0.1))
        batch = torch.full((1, 3), fabric.global_rank + 1.0)
        if which != "the first pass":
            fabric.backward(model(batch).sum())
            optimizer.step()
            optimizer.zero_grad()
        if which == "a copy":
            model, optimizer = copy.deepcopy((model, optimizer))
        seen: list[torch.Tensor] = []
        next(model.module.children()).register_forward_hook(lambda *given: seen.append(given[-1]))
        model(batch)
        fabric.backward(seen[0].sum())
        with pytest.raises(MisuseError) as caught:
            optimizer.step()
        return str(caught.value)


@pytest.mark.parametrize("which", ["the first pass", "a later pass", "a copy"])
def test_a_static_graph_that_reduced_nothing_is_noticed(which: str, two_ranks: RankPool) -> None:
    """Whether it never reduced, did so before, or is a copy of one that did, which has its own first pass."""
    for said in two_ranks.run(_round_the_output, which):
        assert "gradients were not averaged over the ranks" in said


def _late() -> bool:
    with Fabric(accelerator="cpu", strategy="ddp:timeout=PT2S", devices=2) as fabric:
        fabric.launch()
        store: Any = fabric.strategy.world.open_store()  # type: ignore[attr-defined]
        if fabric.global_rank == 1:
            # The key comes when rank 0 has given up; without the option it never would.
            store.wait(["gave up"], timedelta(seconds=20))
            return True
        with pytest.raises(RuntimeError):
            dist.barrier()
        store.set("gave up", "")
        return True


def test_a_collective_waits_as_long_as_the_timeout(two_ranks: RankPool) -> None:
    """A rank that waits in vain gives up after the time of the option, and not after half an hour."""
    assert two_ranks.run(_late) == [True, True]


class _Counting(nn.Module):
    """Counts its runs in a buffer."""

    count: torch.Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("count", torch.tensor(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1 + int(x.item())
        y: torch.Tensor = self.layer(x)
        return y


def _counts(options: str) -> tuple[int, int]:
    with Fabric(accelerator="cpu", strategy=f"ddp:{options}", devices=2) as fabric:
        fabric.launch()
        raw = _Counting(10 * (1 + fabric.global_rank))
        model = fabric.setup(raw)
        start = raw.count.item()
        for _ in range(2):
            model(torch.tensor([float(fabric.global_rank)]))
        return int(start), int(raw.count.item())


@pytest.mark.parametrize(
    ("options", "counts"),
    [("broadcast_buffers=true", [(10, 12), (10, 13)]), ("broadcast_buffers=false", [(10, 12), (10, 14)])],
)
def test_buffers(options: str, counts: list[tuple[int, int]], two_ranks: RankPool) -> None:
    """Buffers start as rank 0's; each ``forward`` begins with rank 0's, or they go their own ways from then on."""
    assert two_ranks.run(_counts, options) == counts
