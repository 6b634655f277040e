"""What a rank asks of the store at its start does not grow with the number of ranks."""

import socket
import threading
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from fabric_core.collectives import World
from fabric_core.collectives.process_group import wait_until_connected
from fabric_core.contracts import ProcessInfo
from fabric_core.errors import LaunchError
from fabric_core.running.launching import agree
from fabric_core.running.meeting import meet


class Counted:
    """A store that counts what it is asked; looks whether a key is there are apart."""

    def __init__(self, store: HashStore) -> None:
        self._store = store
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.counts[name] += 1
        return getattr(self._store, name)


def _agree(rank: int, ranks: int, store: Any, timeout: timedelta) -> None:
    world = World(
        global_rank=rank,
        world_size=ranks,
        device=torch.device("cpu"),
        backend="none",
        open_store=lambda: store,
        timeout=timeout,
    )
    plan: Any = SimpleNamespace(world_size=ranks, choices=[])
    nobody: Any = SimpleNamespace(meet=lambda _store: None, check_peers=lambda _world: None)
    agree(world, plan, nobody, nobody)
    wait_until_connected(store, ranks, timeout)


def _asked(ranks: int) -> list[int]:
    """Start ranks as threads, and give how much each asked of the store, ordered."""
    shared = HashStore()
    stores = [Counted(shared) for _ in range(ranks)]
    threads = [
        threading.Thread(target=_agree, args=(rank, ranks, store, timedelta(seconds=60)))
        for rank, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(store.counts.total() - store.counts["check"] for store in stores)


def test_each_rank_asks_as_much_whatever_their_number() -> None:
    """Of 64 ranks the busiest asks what the busiest of 8 does, and so do all but a few."""
    few, many = _asked(8), _asked(64)
    assert few[0] == many[0] == many[-5]
    assert many[-1] <= many[0] + 6
    assert sum(many) - 64 * many[0] <= 8


def test_a_rank_says_whom_it_waits_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """After a while in a line, at the end in the error; the question is one, and the line names eight at most."""
    monkeypatch.setattr("fabric_core.running.launching._SAY", 0.05)
    store = Counted(HashStore())
    store._store.set("plan", "")
    store._store.set("came", "3,1,")
    with pytest.raises(LaunchError, match=r"rank 0 has waited \d s for rank 2, 4, 5, 6, 7, 8, 9, 10, \.\.\.") as caught:
        _agree(0, 12, store, timedelta(seconds=0.3))
    assert caught.value.fields["ranks"] == [2, *range(4, 12)]
    assert capsys.readouterr().err.count("has waited") == 1
    assert store.counts["get"] < 5


def test_a_rank_that_came_and_ended_is_not_called_late() -> None:
    """Where all have come and one never compared, the error doesn't ask for a rank that has called it."""
    store = HashStore()
    store.set("came", "1,")
    with pytest.raises(LaunchError, match=r"waited \d s for a rank that called fabric.launch\(\) and went no further"):
        _agree(0, 2, store, timedelta(seconds=0.3))


@pytest.mark.parametrize("job", ["", "job-1"])
def test_whoever_makes_the_store_waits_for_nobody_there(job: str) -> None:
    """So that rank 0 can say who doesn't come."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = ProcessInfo(world_size=2, local_world_size=2, main_port=port, job_id=job)
    store = meet(place, timedelta(seconds=1))
    with pytest.raises(LaunchError, match=r"rank 0 has waited \d+ s for rank 1 to call fabric.launch\(\)"):
        _agree(0, 2, store, timedelta(seconds=1))
