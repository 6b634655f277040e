"""Rules for launchers: what ``start`` does, and what its ranks find."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from fabric_core.conformance import references, snapshot
from fabric_core.conformance.bench import Bench, Place, folder_of_its_own
from fabric_core.conformance.pool import RankHang
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.launcher.measures import (
    FRESH,
    alone,
    left_behind,
    set_up_and_undo,
    start,
    start_ranks,
    two_ranks,
)
from fabric_core.fabric import Fabric

TABLE: Final = Table("launcher", inside=False)


def _answer(one: int, other: int) -> int:
    return one + other


def _fail() -> None:
    raise ZeroDivisionError("the kit's own")


def _start_one(place: Place, function: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    alone()
    return start(place.plugin(), function, *args, processes=1)


@TABLE.rule(
    "LAU-505",
    "`start` runs the function with its arguments, and gives what it returned on rank 0; who starts nothing refuses "
    "with LaunchError.",
    reason="Notebooks get their trained model back by it.",
    advice="pass order.args on, and return rank 0's result",
)
def _returns(bench: Bench) -> None:
    outcome, result = bench.fresh(_start_one, _answer, 40, 2)
    if outcome != "refused" and result != 42:
        raise Broken(f"it gives {result!r}, and the function returned 42")


@TABLE.rule(
    "LAU-506",
    "`start` raises where the function raised.",
    reason="A failed training must not look like one that ended.",
    advice="raise RankFailedError with the rank's traceback",
)
def _raises(bench: Bench) -> None:
    outcome, result = bench.fresh(_start_one, _fail)
    if outcome == "ran":
        raise Broken(f"it gives {result!r}")


@TABLE.rule(
    "LAU-508",
    "Who starts several processes gives what the function returned on rank 0, however large, and leaves the process "
    "that started them as it was; who can't, refuses with LaunchError.",
    reason="A notebook goes on after a training, in the same process.",
    advice="wait for every rank, return rank 0's result, and undo what was set; or raise LaunchError at once",
)
def _several(bench: Bench) -> None:
    outcome, result, left = two_ranks(bench)
    if left:
        raise Broken(f"it leaves {', '.join(left)} changed")
    if outcome == "refused":
        return
    if not isinstance(result, tuple) or result[0] not in {0, -1} or len(result[2]) != 3_000_000:
        raise Broken(f"it gives {repr(result)[:300]}, and rank 0 returned its rank, the number of ranks and 3 MB")


@TABLE.rule(
    "LAU-509",
    "A rank that fails, whichever, makes `start` raise, and no process is left.",
    reason="A training in which one rank is gone must not look like one that ended.",
    advice="end the other ranks, wait for them, and raise RankFailedError",
)
def _one_fails(bench: Bench) -> None:
    outcome, result, left = bench.fresh(start_ranks, 1)
    if outcome == "ran":
        raise Broken(f"rank 1 failed, and it gives {repr(result)[:100]}")
    if left:
        raise Broken(f"after rank 1 failed it leaves {', '.join(left)} changed")


def _start_on_nodes(place: Place) -> tuple[str, Any, list[str]]:
    return start_ranks(place, None, processes=1, nodes=2)


@TABLE.rule(
    "LAU-512",
    "`start` runs on as many nodes as it is told to, or refuses with LaunchError.",
    reason="A training on one of two nodes looks as if it were the whole.",
    advice="raise LaunchError where order.nodes is not 1, and say how the processes are started instead",
)
def _starts_on_nodes(bench: Bench) -> None:
    try:
        outcome, result, left = bench.fresh(_start_on_nodes)
    except RankHang:  # it waits for a second node
        return
    if left:
        raise Broken(f"it leaves {', '.join(left)} changed")
    if outcome != "refused" and not (isinstance(result, tuple) and result[1] == 2):
        raise Broken(f"told to start one process on each of two nodes it gives {repr(result)[:100]}")


_starter = 0
"""The process that starts ranks, where a rank was forked from it."""


def _look_around(place: Place, folder: str) -> Any:
    """Look, as a rank, at how it was started; meet the others; give what is wrong."""
    handlers = [signal.Signals(one).name for one, fresh in FRESH.items() if signal.getsignal(one) != fresh]
    found = [f"the handler of {name} is not a fresh process's" for name in handlers]
    info = place.plugin().detect(dict(os.environ))
    if info is None:
        return _starter, ["detect gives nothing in a rank"]
    if (info.attempt, info.node_rank, info.local_rank) != (0, 0, info.global_rank):
        found.append(f"on one node, started once, it finds {info}")
    found += set_up_and_undo(place.plugin(), info)
    with Fabric(
        accelerator=references.Host(),
        strategy=references.Averaging(),
        precision=references.Full(),
        devices=info.world_size,
        plugins=[place.plugin(), references.OneFile()],
    ) as fabric:
        fabric.launch()
        met = fabric.all_gather(torch.tensor(fabric.global_rank)).tolist()
        Path(folder, str(info.global_rank)).write_text(json.dumps([*found, *([] if met == [0, 1] else [met])]))
        fabric.barrier()
    every = [json.loads(one.read_text()) for one in Path(folder).iterdir()]
    return _starter, [wrong for one in every for wrong in one]


def _start_by(place: Place, methods: tuple[str | None, ...]) -> list[tuple[str | None, str, Any, list[str]]]:
    """Start ranks by each method, all by one plugin; give what came of it."""
    global _starter  # noqa: PLW0603 - forked ranks see it, and no others do
    _starter = os.getpid()
    alone()
    for one, handler in FRESH.items():
        signal.signal(one, handler)
    plugin, seen = place.plugin(), []
    for method in methods:
        before = snapshot.take()
        with folder_of_its_own() as folder:
            outcome, result = start(plugin, _look_around, place, str(folder), start_method=method)
        if outcome == "ran" and not isinstance(result, tuple):
            outcome = "raised"
        if outcome == "ran":
            forked, result = result[0] == _starter, result[1]
            if method is not None and forked != (method == "fork"):
                result = [*result, "the ranks were forked" if forked else "the ranks were not forked"]
        seen.append((method, outcome, result, left_behind(before)))
    return seen


@TABLE.rule(
    "LAU-516",
    "`start` keeps the method of starting or refuses it; again and again it starts ranks that meet, whose signals do "
    "what they do in a fresh process.",
    reason="What is defined in a notebook reaches ranks by forking alone; and who presses Ctrl-C must be heard.",
    advice="use order.start_method; in a forked rank set the default handlers; keep nothing of an earlier launch",
)
def _keeps_methods(bench: Bench) -> None:
    seen = [one for methods in (("fork",), ("forkserver", "forkserver")) for one in bench.fresh(_start_by, methods)]
    if all(outcome == "refused" for _, outcome, _, _ in seen):
        seen += bench.fresh(_start_by, (None, None))
    for method, outcome, result, left in seen:
        if left:
            raise Broken(f"by {method!r}, it leaves {', '.join(left)} changed")
        if outcome == "raised" or (outcome == "ran" and result):
            raise Broken(f"by {method!r}: {result}")
