"""Two ``Fabric`` objects of one process share PyTorch's one default process group."""

import gc
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import LaunchError, SetupError
from fabric_plugins.strategies import DDPStrategy


def _one_after_the_other_ends(first_strategy: str, second_strategy: str) -> list[float]:
    first = Fabric(accelerator="cpu", strategy=first_strategy, devices=2)
    first.launch()
    second = Fabric(accelerator="cpu", strategy=second_strategy, devices=2)
    second.launch()
    sums = [first.all_reduce(torch.ones(1), reduce_op="sum").item()]
    first.teardown()
    sums.append(second.all_reduce(torch.ones(1), reduce_op="sum").item())
    bare = torch.nn.Linear(2, 1)
    model = second.setup(bare)
    second.backward(model(torch.ones(1, 2)).sum())
    sums.append(float(dist.is_initialized()))
    second.teardown()
    return [*sums, float(dist.is_initialized())]


def test_the_last_to_be_torn_down_ends_the_group(two_ranks: RankPool) -> None:
    """The one that made the group can go first; the other trains on, and ends the group when it goes."""
    for pair in (("ddp", "ddp"), ("ddp", "fsdp"), ("fsdp", "ddp")):
        assert two_ranks.run(_one_after_the_other_ends, *pair) == [[2.0, 2.0, 1.0, 0.0]] * 2


def _beside_a_group_of_the_user_s(rank_count: int) -> bool:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with Fabric(accelerator="cpu", strategy="ddp", devices=rank_count) as fabric:
            fabric.barrier()
        return dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_group_of_the_user_s_stays() -> None:
    """A group that was there before is used, and left as it was."""
    assert _beside_a_group_of_the_user_s(1)


def _after_a_dropped_one() -> list[bool]:
    dropped = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    dropped.launch()
    dropped.barrier()
    del dropped
    gc.collect()
    there = [dist.is_initialized()]
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        fabric.barrier()
    return [*there, dist.is_initialized()]


def test_what_a_dropped_one_left_is_ended_by_the_next(two_ranks: RankPool) -> None:
    """A ``Fabric`` that is dropped without teardown can end nothing; the next one uses its group, and ends it."""
    assert two_ranks.run(_after_a_dropped_one) == [[True, False]] * 2


def _with_other_options(options: dict[str, Any]) -> str:
    with Fabric(accelerator="cpu", strategy=DDPStrategy(timeout=timedelta(seconds=60)), devices=2) as first:
        first.launch()
        second = Fabric(accelerator="cpu", strategy=DDPStrategy(**options), devices=2)
        try:
            second.launch()
        except LaunchError as error:
            first.barrier()
            return str(error)
        second.teardown()
        first.barrier()
        return "joined"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "joined"),
        ({"timeout": timedelta(seconds=60), "process_group_backend": "gloo"}, "joined"),
        ({"process_group_backend": "cpu:gloo"}, "joined"),
        ({"process_group_backend": "cpu:gloo,cuda:nccl"}, "process_group_backend: cpu:gloo,cuda:gloo there"),
        ({"timeout": timedelta(seconds=61)}, "timeout: 0:01:00 there, 0:01:01 asked for"),
    ],
)
def test_options_that_cannot_apply_are_refused(options: dict[str, Any], said: str, two_ranks: RankPool) -> None:
    """A second ``Fabric`` joins the first one's group, unless it asks for another; the first is none the worse."""
    for got in two_ranks.run(_with_other_options, options):
        assert said in got


def _in_a_group_of_one() -> bool:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(LaunchError, match="world_size: 1 there, 2 asked for"):
            Fabric(accelerator="cpu", strategy="ddp", devices=2).launch()
        return dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_group_of_another_size_is_refused(two_ranks: RankPool) -> None:
    """A group of the user's must be one of all processes; one that isn't is left as it was."""
    assert two_ranks.run(_in_a_group_of_one) == [True, True]


def _alone(options: dict[str, Any]) -> list[Any]:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        player = Fabric(accelerator="cpu", devices=1, **options)
        player.launch()
        bare = torch.nn.Linear(2, 1)
        model, optimizer = player.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
        player.backward(model(torch.full((1, 2), float(fabric.global_rank))).sum())
        optimizer.step()
        own = [player.world_size, player.global_rank, bare.weight.grad[0, 0].item()]  # type: ignore[index]
        player.teardown()
        return [*own, fabric.all_reduce(torch.ones(1), reduce_op="sum").item()]


def test_after_joining_a_plan_of_one_is_alone(two_ranks: RankPool) -> None:
    """An evaluator or a player beside the training averages nothing with others, and leaves the training as it was."""
    for options in ({}, {"strategy": "single_device"}):
        assert two_ranks.run(_alone, options) == [[1, 0, 0.0, 2.0], [1, 0, 1.0, 2.0]]


def _before(options: dict[str, Any]) -> str:
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    try:
        fabric.launch()
    except LaunchError as error:
        return str(error)
    return f"alone among {fabric.world_size}"


def test_before_joining_a_plan_of_one_must_be_meant(two_ranks: RankPool) -> None:
    """Two started processes and a plan of one are an error that names the way to be alone, which works."""
    for said in two_ranks.run(_before, {}):
        assert 'devices=2, num_nodes=1; or strategy="single_device", for each to be alone' in said
    assert two_ranks.run(_before, {"strategy": "single_device"}) == ["alone among 1"] * 2
    assert all("for each to be alone" not in said for said in two_ranks.run(_before, {"strategy": "fsdp"}))


def _over_a_part() -> Any:
    with Fabric(accelerator="cpu", strategy="ddp", devices=3) as first:
        first.launch()
        part = dist.new_group([1, 2])
        with Fabric(accelerator="cpu", devices=3, strategy=DDPStrategy(process_group=part)) as fabric:
            fabric.launch()
            rank = fabric.global_rank
            frozen = torch.nn.Linear(1, 1).requires_grad_(requires_grad=False)
            torch.nn.init.constant_(frozen.weight, float(rank))
            if rank == 0:
                with pytest.raises(SetupError, match="rank 0 is no member"):
                    fabric.setup(torch.nn.Linear(2, 1))
                fabric.barrier()
                return None
            bare = torch.nn.Linear(2, 1)
            model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
            fabric.backward(model(torch.full((1, 2), float(rank))).sum())
            optimizer.step()
            fabric.setup(frozen)
            fabric.barrier()
            return bare.weight.detach(), bare.weight.grad[0, 0].item(), frozen.weight.item()  # type: ignore[index]


def test_a_part_of_the_ranks_trains_together() -> None:
    """With a group of the user's, models start alike in it and gradients are averaged over it; others are refused."""
    with RankPool(3) as ranks:
        outsider, one, other = ranks.run(_over_a_part)
    assert outsider is None
    assert torch.equal(one[0], other[0])
    assert one[1:] == other[1:] == (1.5, 1.0)
