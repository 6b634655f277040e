"""Real ranks that are seeded differently read the parts of one order."""

import torch
from torch.utils.data import DataLoader, SubsetRandomSampler

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool


def _read(strategy: str) -> list[list[int]]:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        torch.manual_seed(100 + fabric.global_rank)
        loaders = fabric.setup_dataloaders(
            DataLoader(range(20), sampler=SubsetRandomSampler(range(10)), batch_size=2),  # type: ignore[arg-type]
            DataLoader(range(10), shuffle=True, batch_size=2),  # type: ignore[arg-type]
        )
        torch.rand(fabric.global_rank)
        return [[int(one) for batch in loader for one in batch] for loader in loaders]


def test_ranks_read_the_parts_of_one_order(two_ranks: RankPool) -> None:
    """Together the ranks read each element once, in an order that is drawn at random."""
    (left, right) = two_ranks.run(_read, "ddp")
    for one, other in zip(left, right, strict=True):
        assert sorted(one + other) == list(range(10))
        assert one != sorted(one) or other != sorted(other)
