"""``fabric-core doctor`` on one machine, and how it judges what the ranks found."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from fabric_core.cli._facts import judge_facts, resolve_name
from fabric_core.cli._links import _rounds, _takes_long, judge_links


def _fact(rank: int, **own: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"own": {"name": f"host{rank // 2}", "addresses": [], "error": None, "seconds": 0.0}}
    base = {
        "rank": rank,
        "local_rank": rank % 2,
        "node": rank // 2,
        "host": f"host{rank // 2}",
        "python": "3.11.7",
        "torch": "2.13.0",
        "plugins": {"acme": "1.0"},
        "plan": "abc",
        "plan_error": None,
        "names": names,
        "free_bytes": {"temporary": 1 << 40, "shared": 1 << 40},
        "limits": {"open_files": 4096, "locked_memory": None},
        "late": 0.0,
        "compute": 0.01,
        "clock": 0.0,
    }
    return {**base, **own}


def test_equal_ranks_are_sound() -> None:
    """Nothing is said of ranks that have what they need and agree."""
    assert judge_facts([_fact(rank) for rank in range(4)]) == []


@pytest.mark.parametrize(
    ("own", "where", "what"),
    [
        ({"torch": "2.12.0"}, "rank 2 on node 1 (host1)", "PyTorch is 2.12.0 here, and 2.13.0 elsewhere"),
        ({"python": "3.12.0"}, "rank 2 on node 1 (host1)", "Python is 3.12.0 here"),
        ({"plugins": {"acme": "2.0"}}, "rank 2 on node 1 (host1)", "acme is 2.0 here, and 1.0 elsewhere"),
        ({"plugins": {}}, "rank 2 on node 1 (host1)", "acme is nothing here, and 1.0 elsewhere"),
        ({"plan": "xyz"}, "rank 2 on node 1 (host1)", "the plan is xyz here, and abc elsewhere"),
        ({"plan": None, "plan_error": "no"}, "rank 2 on node 1 (host1)", "no plan can be made: no"),
        ({"late": 20.0}, "rank 2 on node 1 (host1)", "it came 20 s after rank 0"),
        ({"compute": 0.1}, "rank 2 on node 1 (host1)", "it is slow: it computes in 0.1000 s what takes most 0.0100 s"),
        ({"clock": -3.0}, "rank 2 on node 1 (host1)", "its clock is -3.0 s off rank 0's"),
        ({"free_bytes": {"temporary": 1 << 20}}, "node 1 (host1)", "temporary folder has 1 MiB free"),
        ({"free_bytes": {"shared": 64 << 20}}, "node 1 (host1)", "shared memory has 64 MiB free"),
        ({"limits": {"open_files": 256}}, "node 1 (host1)", "a process may open 256 files"),
    ],
)
def test_what_is_broken_is_named(own: dict[str, Any], where: str, what: str) -> None:
    """One rank of four differs or lacks something: that rank, or its node, and nothing else."""
    faults = judge_facts([_fact(0), _fact(1), _fact(2, **own), _fact(3)])
    assert [(one.where, one.what.startswith(what)) for one in faults] == [(where, True)]


def test_a_name_is_resolved_in_time() -> None:
    """One that nobody knows has an error, and one that is known its addresses."""
    assert resolve_name("localhost")["error"] is None
    assert resolve_name("no-such-host.invalid")["error"]


@pytest.mark.parametrize("count", range(2, 10))
def test_each_pair_meets_once(count: int) -> None:
    """In no round does a rank have two others."""
    rounds = list(_rounds(count))
    pairs = [pair for one in rounds for pair in one]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    for one in rounds:
        assert len({rank for pair in one for rank in pair}) == 2 * len(one)


def _link(one: int, other: int, seconds: float) -> dict[str, Any]:
    rows = [{"bytes": size, "seconds": seconds, "bytes_per_second": size / seconds} for size in (8, 4 << 20)]
    return {"ranks": [one, other], "sizes": rows}


@pytest.mark.parametrize(
    ("slow", "where"),
    [
        ({(0, 2), (0, 3), (1, 2), (1, 3)}, "the link of node 0 (host0) and node 1 (host1)"),
        ({(0, 3), (1, 3), (2, 3)}, "the link of rank 3 on node 1 (host1) and all"),
        ({(0, 1)}, "the link of rank 0 on node 0 (host0) and rank 1 on node 0 (host0)"),
    ],
)
def test_a_slow_link_is_named_once(slow: set[tuple[int, int]], where: str) -> None:
    """By the nodes, where all between them are slow; by the rank, where all of its own are; else by the pair."""
    links = [_link(a, b, 0.03 if (a, b) in slow else 1e-4) for a in range(4) for b in range(a + 1, 4)]
    faults = judge_links(links, {rank: _fact(rank) for rank in range(4)}, 5.0, 50.0)
    assert [one.where for one in faults] == [where]


def test_a_large_message_is_left_out_over_a_slow_link() -> None:
    """By what each byte took more: at 1 MB/s 4 MiB are too much, and a late link that is wide is not slow."""
    narrow = [{"bytes": 8, "seconds": 0.001}, {"bytes": 65536, "seconds": 0.066}]
    late = [{"bytes": 8, "seconds": 0.100}, {"bytes": 65536, "seconds": 0.101}]
    assert _takes_long(narrow, 4 << 20)
    assert not _takes_long(late, 4 << 20)


@pytest.mark.slow
def test_it_starts_the_ranks_of_one_machine() -> None:
    """From a shell: two ranks, one JSON document, exit code 0 or, below a bandwidth that nothing has, 1."""
    for bandwidth, code in (("0", 0), ("1e9", 1)):
        words = ("--accelerator", "cpu", "--strategy", "ddp", "--devices", "2", "--max-latency", "1000")
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "fabric_core", "doctor", "--json", *words, "--min-bandwidth", bandwidth],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert time.monotonic() - start < 75
        report = json.loads(done.stdout)
        assert (done.returncode, report["sound"], len(report["ranks"])) == (code, code == 0, 2), report["faults"]
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.sampled(0.2)
def test_a_rank_that_is_stopped_is_named() -> None:
    """Its process is there and says nothing; rank 0 ends in time all the same, and names it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    asked = ("--accelerator", "cpu", "--strategy", "ddp", "--within", "30")
    command = [sys.executable, "-m", "fabric_core", "doctor", *asked]
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    try:
        ranks[1].send_signal(signal.SIGSTOP)
        out, _ = ranks[0].communicate(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            assert rank.stdout is not None
            rank.stdout.close()
    assert ranks[0].returncode == 1
    assert "rank 1: it did not come" in out
    assert "rank 0:" not in out
