"""Rules for strategies: tensors that ranks fill for each other, and gradients that flow where they were asked to."""

from typing import Any, Final

import torch

from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import ALWAYS

TABLE: Final = Table("strategy", inside=False)


def _filled(place: Place) -> list[tuple[list[Any], list[float]]]:
    """Let each rank fill the others' tensors once; give what they hold, and what lies between those of a view."""
    found = []
    with place.fabric() as fabric:
        own = place.rank + 1
        for src in range(place.world_size):
            room = torch.full((2, 4), -1.0, device=fabric.device)
            room[:, ::2] = own
            tensors = [
                torch.full((2, 3), float(own), device=fabric.device),
                torch.full((3, 2), own, device=fabric.device).t(),
                torch.tensor(own % 2 == 0, device=fabric.device),
                torch.empty(0, device=fabric.device),
                torch.full((2,), float(own), dtype=torch.bfloat16),
                room[:, ::2],
            ]
            fabric.strategy.collectives.broadcast_tensors(tensors, src)
            found.append(([one.tolist() for one in tensors], room[:, 1::2].flatten().tolist()))
    return found


@TABLE.rule(
    "STR-402",
    "`collectives.broadcast_tensors` gives every rank the values of the named rank's tensors, in place, whatever their "
    "layout, type and device.",
    reason="Parameters start alike, and checkpoints reach the ranks that didn't read them, by it.",
    advice="broadcast from src a contiguous copy on the strategy's device, and copy it back into each tensor",
    world_sizes=ALWAYS,
)
def _fills(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_filled)):
        for src, (held, between) in enumerate(seen):
            one = float(src + 1)
            wanted = [[[one] * 3] * 2, [[src + 1] * 3] * 2, (src + 1) % 2 == 0, [], [one] * 2, [[one] * 2] * 2]
            if held != wanted:
                raise Broken(f"rank {rank} has {held} from rank {src}, whose are {wanted}")
            if between != [-1.0] * 4:
                raise Broken(f"rank {rank}: what lies between the places of a view is written over")


def _attached(place: Place) -> list[str]:
    """Reduce and gather what needs gradients; name what came back needing them."""
    with place.fabric() as fabric:
        given = 2 * torch.ones(3, device=fabric.device, requires_grad=True)
        found = {
            "all_reduce": fabric.strategy.all_reduce(given, None, "sum"),
            "all_gather": fabric.strategy.all_gather(given, None, False)[0],
        }
        return [name for name, one in found.items() if one.requires_grad]


@TABLE.rule(
    "STR-403",
    "What `all_reduce`, and `all_gather` without `sync_grads`, give needs no gradients, whatever they were given.",
    reason="A logged loss that holds its graph keeps every activation of its step in memory.",
    advice="detach the tensor first",
    world_sizes=ALWAYS,
)
def _detaches(bench: Bench) -> None:
    for rank, names in enumerate(bench.run(_attached)):
        if names:
            raise Broken(f"rank {rank}: what {' and '.join(names)} gave needs gradients")
