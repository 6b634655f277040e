"""What a strategy's ``connect`` returns: used, forked, closed, and refused where it connects nobody."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch

from fabric_core import Fabric, Strategy
from fabric_core.choosing.registry import registered
from fabric_core.collectives import Collectives, SingleProcess, World
from fabric_core.contracts import PrecisionPolicy, StrategyCapabilities
from fabric_core.errors import LaunchError, MisuseError, RequestError
from fabric_core.running.launching import check_connected


class Counting(SingleProcess):
    """One process that counts how often it is closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


class Connecting(Strategy):
    """Makes collectives that it hands to the world for closing, then fails where it is told to."""

    capabilities = StrategyCapabilities(max_world_size=1)
    made: Counting
    fails = False

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        type(self).made = Counting()
        world.closing.callback(self.made.close)
        if self.fails:
            raise RuntimeError("half-way")
        return self.made


class Failing(Connecting):
    fails = True


def test_the_core_closes_what_connect_made(in_memory: dict[str, Any]) -> None:
    """At the end of the ``Fabric``, and once."""
    with registered("strategy", "connecting", Connecting):
        fabric = Fabric(**{**in_memory, "strategy": "connecting"})
        fabric.launch()
        assert fabric.strategy.collectives is Connecting.made
        assert Connecting.made.closed == 0
        fabric.teardown()
        fabric.teardown()
    assert Connecting.made.closed == 1
    with pytest.raises(MisuseError, match="not connected"):
        fabric.strategy.barrier()


def test_the_core_closes_what_connect_made_before_it_raised(in_memory: dict[str, Any]) -> None:
    """A strategy needs no teardown for its collectives."""
    with registered("strategy", "failing", Failing):
        fabric = Fabric(**{**in_memory, "strategy": "failing"})
        with pytest.raises(RuntimeError, match="half-way"):
            fabric.launch()
    assert Failing.made.closed == 1


def _world(size: int) -> World:
    return World(device=torch.device("cpu"), backend="none", world_size=size, timeout=timedelta(seconds=1))


def test_what_connects_nobody_is_refused() -> None:
    """Collectives of one process in a world of several would train each rank alone."""
    strategy = Connecting()
    check_connected(SingleProcess(), _world(1), strategy)
    with pytest.raises(LaunchError, match="did not connect the 2 processes"):
        check_connected(SingleProcess(), _world(2), strategy)
    with pytest.raises(LaunchError, match="returned no Collectives"):
        check_connected(None, _world(1), strategy)


@pytest.mark.parametrize("operation", ["sum", "mean", "avg", "max", "min", "product", "MEAN"])
def test_one_process_checks_what_several_check(operation: str) -> None:
    """A reduction gives a new tensor, of the same type but for a mean of integers."""
    given = torch.tensor([2, 3])
    result = SingleProcess().all_reduce(given, None, operation)
    assert result.tolist() == [2, 3]
    assert result.data_ptr() != given.data_ptr()
    assert result.dtype == (torch.float32 if operation.lower() in {"mean", "avg"} else torch.int64)


def test_one_process_refuses_what_several_refuse() -> None:
    """An unknown operation, and a rank that does not exist."""
    alone: Collectives = SingleProcess()
    tensors: Sequence[torch.Tensor] = [torch.ones(1)]
    with pytest.raises(RequestError, match="no such reduction"):
        alone.all_reduce(torch.ones(1), None, "median")
    for act in (lambda: alone.broadcast("word", 1), lambda: alone.broadcast_tensors(tensors, 1)):
        with pytest.raises(RequestError, match="no such rank"):
            act()
    assert alone.fork() is alone
