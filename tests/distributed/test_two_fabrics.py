"""Two ``Fabric`` objects of one process share PyTorch's one default process group."""

import torch
import torch.distributed as dist

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool


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
