"""How fast the ranks of a world exchange data: all together, and each pair."""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist

from fabric_core.cli._facts import Fault, node_of, rank_of
from fabric_core.collectives import Collectives, ProcessGroup
from fabric_core.contracts import Accelerator, World

__all__ = ["SIZES", "judge_links", "measure_compute", "measure_pairs", "measure_together"]

SIZES: Final = (8, 64 << 10, 4 << 20)
"""The sizes of messages, in bytes."""

_LONG: Final = 3.0
"""A size whose messages would take more seconds in all than this is left out."""
_MOST: Final = 20
_ENOUGH: Final = 0.2
"""After how many seconds no further message of one size is sent between a pair."""
_REPEATS: Final = 3
_SIDE: Final = 512


def measure_compute(world: World, accelerator: Accelerator) -> float:
    """Multiply two small matrices some times on this rank's device; gives the seconds of the fastest time."""
    matrix = torch.ones(_SIDE, _SIDE, device=world.device)

    def multiply() -> float:
        start = time.perf_counter()
        matrix @ matrix
        accelerator.synchronize(world.device)
        return time.perf_counter() - start

    return min(multiply() for _ in range(10))


def measure_together(collectives: Collectives, world: World) -> list[dict[str, Any]]:
    """All-reduce messages of each size: the seconds of the fastest, of the rank that took longest, and bytes/s."""
    rows: list[dict[str, Any]] = []
    for size, following in itertools.pairwise((*SIZES, SIZES[-1])):
        data = torch.ones(size // 8, dtype=torch.float64, device=world.device)
        best = float("inf")
        for _ in range(_REPEATS + 1):
            start = time.perf_counter()
            collectives.all_reduce(data, None, "sum")[0].item()
            best = min(best, time.perf_counter() - start)
        slowest = collectives.all_reduce(torch.tensor([best], dtype=torch.float64, device=world.device), None, "max")
        best = float(slowest.item())
        rows.append(_row(size, best))
        if _takes_long(rows, following):
            break
    return rows


def measure_pairs(
    group: ProcessGroup, world: World, left: Callable[[], float]
) -> Iterator[tuple[int, list[dict[str, Any]], float | None]]:
    """Send messages of each size to and fro between this rank and each other; pairs that share no rank, at once.

    Args:
        group: All ranks.
        world: This process.
        left: Gives how many seconds are left.

    Yields:
        Of each pair that this rank leads: the other rank, seconds one way and bytes/s of each size, and how much later
        the other's clock is, in seconds, where this is rank 0.
    """
    for pairs in _rounds(world.world_size):
        for one, other in pairs:
            if world.global_rank == one:
                yield other, *_lead(group, world, other)
            elif world.global_rank == other:
                _follow(group, world, one)
        late = torch.tensor([float(left() < _LONG)], device=world.device)
        if group.all_reduce(late, None, "max").item():
            return


def _rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Let each meet each once, as in a tournament."""
    players = list(range(count + count % 2))
    for _ in players[1:]:
        pairs = zip(players[: len(players) // 2], reversed(players), strict=False)
        yield [(min(pair), max(pair)) for pair in pairs if max(pair) < count]
        players.insert(1, players.pop())


def _lead(group: ProcessGroup, world: World, other: int) -> tuple[list[dict[str, Any]], float | None]:
    rows: list[dict[str, Any]] = []
    clock = None
    for size, following in itertools.pairwise((*SIZES, SIZES[-1])):
        data = torch.zeros(size // 8, dtype=torch.float64, device=world.device)
        best, began = float("inf"), time.perf_counter()
        for count in range(_MOST):
            last = count == _MOST - 1 or (count > 0 and time.perf_counter() - began > _ENOUGH)
            skip = last and _takes_long([*rows, _row(size, best)], following)
            data[0] = 2.0 if skip or (last and size == SIZES[-1]) else float(last)
            start, wall = time.perf_counter(), time.time()
            dist.send(data, other, group=group.group)
            dist.recv(data, other, group=group.group)
            theirs = float(data[0].item())
            seconds = (time.perf_counter() - start) / 2
            if seconds < best:
                best = seconds
                if size == SIZES[0] and world.global_rank == 0:
                    clock = theirs - wall - seconds
            if last:
                break
        rows.append(_row(size, best))
        if skip:
            break
    return rows, clock


def _follow(group: ProcessGroup, world: World, one: int) -> None:
    for size in SIZES:
        data = torch.zeros(size // 8, dtype=torch.float64, device=world.device)
        order = 0.0
        while not order:
            dist.recv(data, one, group=group.group)
            order = float(data[0].item())
            data[0] = time.time()
            dist.send(data, one, group=group.group)
        if order > 1:
            return


def _row(size: int, seconds: float) -> dict[str, Any]:
    return {"bytes": size, "seconds": seconds, "bytes_per_second": size / seconds}


def _takes_long(rows: Sequence[Mapping[str, Any]], following: int) -> bool:
    """Say whether messages of a size would take too long, from what each byte more took before."""
    if len(rows) < 2:  # noqa: PLR2004 - a difference needs two
        return False
    (first, second) = rows[-2:]
    each = (second["seconds"] - first["seconds"]) / (second["bytes"] - first["bytes"])
    return bool(each * following * 2 * (_REPEATS + 1) > _LONG and following > second["bytes"])


def judge_links(
    links: Sequence[Mapping[str, Any]],
    ranks: Mapping[int, Mapping[str, Any]],
    max_latency: float,
    min_bandwidth: float,
) -> list[Fault]:
    """Name slow links: between two nodes where all pairs of ranks are slow, of a rank where all of its own are.

    Args:
        links: ``ranks`` and ``sizes`` of each.
        ranks: What is known of each rank.
        max_latency: How many milliseconds the smallest message may take.
        min_bandwidth: How many MB/s the largest must reach.
    """

    def bad(link: Mapping[str, Any]) -> bool:
        slow: bool = link["sizes"][0]["seconds"] * 1e3 > max_latency
        narrow: bool = link["sizes"][-1]["bytes_per_second"] / 1e6 < min_bandwidth
        return slow or narrow

    every: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for link in links:
        one, other = (ranks[rank] for rank in link["ranks"])
        if one["node"] != other["node"]:
            every["nodes", one["node"], other["node"]].append(link)
    for rank in ranks if len(ranks) > 2 else ():  # noqa: PLR2004 - of two, nobody knows whose fault it is
        every["rank", rank] = [link for link in links if rank in link["ranks"]]
    named: list[Mapping[str, Any]] = []
    faults = []
    instead = f"at most {max_latency:g} ms and at least {min_bandwidth:g} MB/s; look at the network between them"
    for key, own in every.items():
        fresh = [link for link in own if link not in named]
        if fresh and all(map(bad, own)):
            one, other = (ranks[rank] for rank in own[0]["ranks"])
            what = f"{node_of(one)} and {node_of(other)}" if key[0] == "nodes" else f"{rank_of(ranks[key[1]])} and all"
            faults.append(Fault(f"the link of {what}", _said(own), instead))
            named += own
    for link in links:
        if bad(link) and link not in named:
            names = " and ".join(rank_of(ranks[rank]) for rank in link["ranks"])
            faults.append(Fault(f"the link of {names}", _said([link]), instead))
    return faults


def _said(links: Sequence[Mapping[str, Any]]) -> str:
    latency = min(link["sizes"][0]["seconds"] for link in links) * 1e3
    bandwidth = max(link["sizes"][-1]["bytes_per_second"] for link in links) / 1e6
    return f"it is slow: {latency:.2f} ms, {bandwidth:.1f} MB/s"
