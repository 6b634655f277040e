"""Ranks that differ, or that something else started in another number, fail on every rank at once, with the reason."""

import os
import time
from typing import Any

import pytest

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import LaunchError


def _launch(by_rank: list[dict[str, Any]]) -> tuple[str, list[int], float]:
    rank = int(os.environ["RANK"])
    fabric = Fabric(**{"accelerator": "cpu", "strategy": "ddp", "devices": 2, **by_rank[rank]})
    start = time.monotonic()
    try:
        fabric.launch()
    except LaunchError as error:
        return str(error), error.fields["ranks"], time.monotonic() - start
    fabric.teardown()
    return "", [], 0.0


@pytest.mark.parametrize(
    ("others", "difference"),
    [
        ({"precision": "bf16-mixed"}, ["precision 32-true", "precision bf16-mixed"]),
        ({"strategy": "fsdp"}, ["strategy ddp", "strategy fsdp"]),
        ({"strategy": "ddp:static_graph=true"}, ["strategy ddp", "strategy ddp {'static_graph': True}"]),
        ({"plugins": ["checkpoint=single_file"]}, ["checkpoint distributed", "nothing on rank 1"]),
    ],
)
def test_ranks_with_different_plans_fail_at_once_everywhere(
    two_ranks: RankPool, others: dict[str, Any], difference: list[str]
) -> None:
    """Every rank raises within seconds, names the rank that differs, and says what each has."""
    for message, ranks, seconds in two_ranks.run(_launch, [{}, others]):
        assert ranks == [1]
        assert "rank 1 differs from rank 0" in message
        for part in difference:
            assert part in message
        assert seconds < 5


def test_the_ranks_in_the_middle_and_at_the_end_are_named(four_ranks: RankPool) -> None:
    """All that differ from rank 0 are named."""
    plans = [{"devices": 4}, {"devices": 4, "precision": "64-true"}, {"devices": 4}, {"devices": 4, "precision": "32"}]
    for message, ranks, _ in four_ranks.run(_launch, plans):
        assert ranks == [1, 3]
        assert "precision 32-true (fabric-registry 0.1.0) on rank 0, precision 64-true" in message


def test_ranks_that_agree_go_on_and_may_join_again(two_ranks: RankPool) -> None:
    """No difference, no error; also for a second and a third ``Fabric``, whatever else one rank has made."""
    assert two_ranks.run(_thrice) == [["", "", ""]] * 2


def _thrice() -> list[str]:
    if os.environ["RANK"] == "0":
        Fabric(accelerator="cpu", strategy="ddp", devices=2)  # never launched
    return [_launch([{}, {}])[0] for _ in range(3)]


def _contradict(arguments: dict[str, Any], launching: bool) -> str:
    fabric = Fabric(**{"accelerator": "cpu", **arguments})
    try:
        if launching:
            fabric.launch()
        else:
            _ = fabric.device
    except LaunchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("arguments", "launching"),
    [
        ({}, True),
        ({}, False),  # one process needs no launch, and must not be one of four without knowing
        ({"devices": 1}, False),
        ({"strategy": "ddp", "devices": 2}, True),
        ({"num_nodes": 2}, True),
    ],
)
def test_another_number_of_processes_than_the_code_says_is_an_error(
    four_ranks: RankPool, arguments: dict[str, Any], launching: bool
) -> None:
    """Started as four by something else, a script that says one or two fails, and doesn't train four times alone."""
    for message in four_ranks.run(_contradict, arguments, launching):
        assert "torchrun started 4 processes (4 on this node), and the plan has" in message
        assert "instead: devices=4, num_nodes=1" in message
