"""The collectives of a user and those of gradients never meet: an order that differs between ranks is an error."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool


def _opposite(strategy: str) -> str:
    with Fabric(
        accelerator="cpu", strategy={"name": strategy, "options": {"timeout": timedelta(seconds=3)}}, devices=2
    ) as fabric:
        fabric.launch()
        model = fabric.setup(nn.Linear(4, 4))
        loss = model(torch.full((2, 4), fabric.global_rank + 1.0)).sum()
        try:
            if fabric.global_rank == 0:
                reduced = fabric.all_reduce(torch.tensor([3.0]))
                fabric.backward(loss)
            else:
                fabric.backward(loss)
                reduced = fabric.all_reduce(torch.tensor([5.0]))
        except RuntimeError as error:
            return f"raised {type(error).__name__}"
        return f"got {reduced.tolist()}"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_in_opposite_order_raise(strategy: str, two_ranks: RankPool) -> None:
    """One rank reduces while the other runs backward: both raise within the timeout."""
    assert [result.split()[0] for result in two_ranks.run(_opposite, strategy)] == ["raised", "raised"]


def _in_between(strategy: str) -> tuple[list[float], float]:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        own = fabric.strategy.collectives
        model = fabric.setup(nn.Linear(1, 1, bias=False))
        loss = model(torch.full((1, 1), fabric.global_rank + 1.0)).sum()
        fabric.backward(loss)
        assert fabric.strategy.all_reduce(torch.tensor([2.0 * fabric.global_rank]), reduce_op="sum").tolist() == [2.0]
        assert fabric.strategy.broadcast(fabric.global_rank, src=1) == 1
        tensors = [torch.full((3,), float(fabric.global_rank)), torch.tensor(fabric.global_rank)]
        own.broadcast_tensors(tensors, 1)
        mean = fabric.all_reduce(torch.tensor([fabric.global_rank, 3])).tolist()
        return mean, float(tensors[0].sum() + tensors[1])


def test_the_mean_of_whole_numbers_is_no_whole_number(two_ranks: RankPool) -> None:
    """It is a floating-point number; the strategy's own methods, as Lightning's scripts call them, do the same."""
    for mean, sent in two_ranks.run(_in_between, "ddp"):
        assert mean == [0.5, 3.0]
        assert sent == 4.0


def _reduced(operations: list[str]) -> list[Any]:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        rank = fabric.global_rank
        given = [
            torch.tensor([rank + 2.0, -rank]),
            torch.tensor([rank + 2], dtype=torch.int16),
            torch.tensor([rank > 0]),
        ]
        return [fabric.all_reduce(one, reduce_op=how).tolist() for how in operations for one in given]


def test_each_operation_reduces_over_the_ranks(two_ranks: RankPool) -> None:
    """Floating-point numbers, 16-bit integers and booleans, of which backends reduce not all."""
    expected = [
        [5.0, -1.0], [5], [True],
        [2.5, -0.5], [2.5], [0.5],
        [3.0, 0.0], [3], [True],
        [2.0, -1.0], [2], [False],
        [6.0, 0.0], [6], [False],
    ]  # fmt: skip
    assert two_ranks.run(_reduced, ["sum", "mean", "max", "min", "product"]) == [expected] * 2
