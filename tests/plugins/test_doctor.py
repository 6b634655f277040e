"""``fabric-core doctor`` on one machine, and how it judges what the ranks found."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from fabric_core import cli
from fabric_core.assembly import assemble
from fabric_core.choosing.offers import Offer
from fabric_core.choosing.registry import Registry
from fabric_core.choosing.request import Request
from fabric_core.cli import _cluster, _meeting
from fabric_core.cli._doctor import examine
from fabric_core.cli._facts import Fault, find_facts, judge_facts, resolve_name
from fabric_core.cli._links import _rounds, _takes_long, judge_links
from fabric_core.cli._meeting import _STAGES, Job, _behind, _measure, _reach, meet_others
from fabric_core.collectives import ProcessInfo
from fabric_core.contracts import World


def _name(name: str, *, error: str | None = None, seconds: float = 0.0) -> dict[str, Any]:
    return {"name": name, "addresses": [], "error": error, "seconds": seconds}


def _fact(rank: int, **own: Any) -> dict[str, Any]:
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
        "names": {"own": _name(f"host{rank // 2}")},
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
        (
            {"names": {"main": _name("main", error="unknown")}},
            "rank 2 on node 1 (host1)",
            "the host name main does not",
        ),
        ({"names": {"own": _name("me", error="unknown")}}, "rank 2 on node 1 (host1)", "the host name me does not"),
        ({"names": {"own": _name("me", seconds=2.0)}}, "rank 2 on node 1 (host1)", "the host name me took 2.0 s"),
    ],
)
def test_what_is_broken_is_named(own: dict[str, Any], where: str, what: str) -> None:
    """One rank of four differs or lacks something: that rank, or its node, and nothing else."""
    faults = judge_facts([_fact(0), _fact(1), _fact(2, **own), _fact(3)])
    assert [(one.where, one.what.startswith(what)) for one in faults] == [(where, True)]


def test_what_a_rank_finds_is_of_its_own_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place, the limits as they are, ``None`` for none, and the names that it needs: rank 0's only among others."""
    limits = {resource.RLIMIT_NOFILE: (512, 4096), resource.RLIMIT_MEMLOCK: (resource.RLIM_INFINITY,) * 2}
    monkeypatch.setattr("resource.getrlimit", limits.__getitem__)
    among = ProcessInfo(global_rank=3, local_rank=1, node_rank=1, main_address="localhost", main_port=1234)
    facts = find_facts(among, Registry(), None, "no such device")
    assert (facts["rank"], facts["local_rank"], facts["node"], facts["host"]) == (3, 1, 1, socket.gethostname())
    assert facts["limits"] == {"open_files": 512, "locked_memory": None}
    assert (facts["plan"], facts["plan_error"]) == (None, "no such device")
    assert {which: name["name"] for which, name in facts["names"].items()} == {
        "own": socket.gethostname(), "main": "localhost",
    }  # fmt: skip
    assert facts["plugins"]["fabric-registry"] == version("fabric-registry")
    assert set(find_facts(ProcessInfo(), Registry(), None, None)["names"]) == {"own"}


def test_what_matters_not_here_is_not_broken() -> None:
    """The own name on one host alone, folders as the second rank of a node sees them, and what has no limit."""
    own = {"free_bytes": {"temporary": 0}, "limits": {"open_files": 1}}
    assert judge_facts([_fact(0, names={"own": _name("me", error="unknown")}), _fact(1, **own)]) == []
    assert judge_facts([_fact(0, limits={"open_files": None})]) == []


def _job(*, as_json: bool, ranks: int, **found: Any) -> Job:
    none: Any = None
    return Job(
        ProcessInfo(global_rank=0, world_size=2), time.monotonic() + 60, as_json, (5.0, 50.0), none,
        ranks={rank: _fact(rank) for rank in reversed(range(ranks))}, **found,
    )  # fmt: skip


def test_all_that_was_found_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks, nodes, what was measured, plugins and faults, each fault once; the last line says whether it is sound."""
    rows = [{"bytes": 8, "seconds": 0.001, "bytes_per_second": 8000.0},
            {"bytes": 4 << 20, "seconds": 0.04, "bytes_per_second": 1e8}]  # fmt: skip
    plugins = [{"name": name, "status": status, "note": "why"} for name, status in (("a", "ok"), ("b", "broken"))]
    fault = Fault("rank 9", "it is silent", "look")
    found = {"together": rows, "links": [{"ranks": [0, 1], "sizes": rows}], "plugins": {"node 0 (host0)": plugins}}
    assert not _job(as_json=False, ranks=2, faults=[fault, fault], **found).say()
    out = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    ranks = [[str(one), "0", "host0", "", "3.11.7", "2.13.0", "abc", "host0 0.0 ms", "+0.000 s"] for one in range(2)]
    measured = ["1.00 ms, 0.0 MB/s", "40.00 ms, 100.0 MB/s"]
    assert table == [
        *ranks, ["node 0 (host0)", "1099.5", "1099.5", "4096", "unlimited"],
        ["all-reduce", *measured], ["0 - 1", *measured],
    ]  # fmt: skip
    assert out[out.rindex("┘") + 2 :].splitlines() == [
        "node 0 (host0): 2 plugins, 1 sound", "rank 9: it is silent", "  instead: look", "plugin b: broken: why",
        "  instead: plugins doctor", "something is broken",
    ]  # fmt: skip
    assert _job(as_json=False, ranks=1).say()
    assert capsys.readouterr().out.endswith("all is sound\n")


def test_the_report_has_the_ranks_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever came first; a slow link is among what is broken."""
    slow = [{"bytes": 8, "seconds": 0.001, "bytes_per_second": 8000.0}] * 2
    assert not _job(as_json=True, ranks=2, links=[{"ranks": [0, 1], "sizes": slow}]).say()
    report = json.loads(capsys.readouterr().out)
    assert [one["rank"] for one in report["ranks"]] == [0, 1]
    assert (report["sound"], report["seen_by"], report["world_size"], report["started_by"]) == (False, 0, 2, None)
    assert [fault["what"] for fault in report["faults"]] == ["it is slow: 1.00 ms, 0.0 MB/s"]


def test_who_does_not_know_rank_0_says_it_and_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has nobody to tell: it prints what it knows itself, and its exit code is 1."""
    monkeypatch.setattr("os._exit", sys.exit)
    job = _job(as_json=False, ranks=1)
    job.ranks[0]["names"] = {"main": _name("nowhere", error="unknown")}
    launcher: Any = None
    with pytest.raises(SystemExit) as end:
        meet_others(job, launcher)
    assert end.value.code == 1
    assert "the host name nowhere does not resolve: unknown" in capsys.readouterr().out


def _start_by_torchrun(monkeypatch: pytest.MonkeyPatch, size: int, local: int) -> None:
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local, "RANK": size - 1, "LOCAL_RANK": local - 1}
    more = {"GROUP_RANK": size // local - 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in {**place, **more}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(("size", "local", "nodes"), [(4, 2, 2), (2, 2, 1), (2, 1, 2), (1, 1, 1)])
def test_the_world_is_the_one_that_was_started(
    monkeypatch: pytest.MonkeyPatch, size: int, local: int, nodes: int
) -> None:
    """What no argument says is what torchrun started; of several ranks, on one node or more, each meets the others."""
    _start_by_torchrun(monkeypatch, size, local)
    monkeypatch.setattr("sys.argv", ["fabric-core", "doctor", "--accelerator", "cpu"])
    met, alone = list[Job](), list[Job]()

    def meet_others(job: Job, _launcher: Any) -> bool:
        met.append(job)
        return True

    def examine_node(job: Job) -> dict[str, list[dict[str, Any]]]:
        alone.append(job)
        return {}

    monkeypatch.setattr(_cluster, "meet_others", meet_others)
    monkeypatch.setattr(_cluster, "examine_node", examine_node)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    (job,) = met or alone
    plan = job.assembly.chosen.plan
    assert (len(met), len(alone)) == (int(size > 1), int(size == 1))
    assert (plan.world_size, plan.num_nodes, job.info.global_rank) == (size, nodes, size - 1)
    assert job.ranks[size - 1]["plan_error"] is None


@pytest.mark.parametrize("started", [False, True])
def test_what_is_wrong_with_the_plan_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    """At once where nothing started this process; else as what is known of its rank, which the others are told."""
    if started:
        _start_by_torchrun(monkeypatch, 2, 2)
    monkeypatch.setattr(_cluster, "meet_others", lambda job, _: job.say())
    monkeypatch.setattr(_cluster, "examine_node", lambda _: {})
    for strategy, code in (("ddp" if started else "single_device", 0), ("dpp", 1 if started else 2)):
        asked = ("--accelerator", "cpu", "--devices", "2" if started else "1", "--strategy", strategy)
        monkeypatch.setattr("sys.argv", ["fabric-core", "doctor", *asked])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == code
        out, err = capsys.readouterr()
        assert ("no plan can be made: there is no strategy 'dpp'" in out) == (code == 1)
        assert ("there is no strategy 'dpp'" in err) == (code == 2)


def test_who_is_behind_is_named_with_what_it_did_last() -> None:
    """By the stages that the ranks told of; one that told of none did not come, and of equal ones none is behind."""
    told, ranks = HashStore(), {rank: _fact(rank) for rank in range(3)}
    assert _behind(told, ranks) == []
    _reach(told, 0, 3)
    _reach(told, 1, 2)
    assert [(one.where, one.what) for one in _behind(told, ranks)] == [
        (
            "rank 1 on node 0 (host0)",
            "it is silent: the last that it did was that it examined plugins, and others connected",
        ),
        (
            "rank 2 on node 1 (host1)",
            "it is silent: the last that it did was that it did not come, and others connected",
        ),
    ]


def test_each_stage_is_told_when_it_is_over_and_the_world_gives_up_before_the_doctor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that whoever hangs is named by what it did last, and there is time left to collect what the others say."""
    request = Request.of(accelerator="cpu", strategy="ddp", devices=1)
    assembly = assemble(request, {}, lambda: None)
    job = replace(_job(as_json=False, ranks=1), info=ProcessInfo(), assembly=assembly)
    told, seen, limits = HashStore(), list[tuple[str, str]](), list[float]()

    def noting(name: str) -> Any:
        def note(*given: Any) -> list[str]:
            seen.append((name, _STAGES[int(told.get("stage/0"))]))
            limits.extend(one.timeout.total_seconds() for one in given if isinstance(one, World))
            return [name]

        return note

    for name in ("measure_compute", "measure_together", "measure_pairs"):
        monkeypatch.setattr(_meeting, name, noting(name))
    try:
        found = _measure(job, told, HashStore())
    finally:
        assembly.bindings.undo()
    assert seen == [("measure_compute", "connected"), ("measure_together", "connected"),
                    ("measure_pairs", "measured all-reduce")]  # fmt: skip
    assert _STAGES[int(told.get("stage/0"))] == "measured all"
    assert limits == pytest.approx([job.left() - 15] * 3, abs=5)
    assert (found["device"], found["links"]) == ("cpu", ["measure_pairs"])


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


def test_every_plugin_is_examined_whatever_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, with what came of it: one that raises, one that ends the process, one that hangs."""
    sources = {
        "fine": "from fabric_plugins.precisions.full import FullPrecision as Plugin\nprint('imported')",
        "raises": "raise KeyError('key')",
        "ends": "import os\nos._exit(7)",
        "hangs": "import time\ntime.sleep(600)",
    }
    for name, source in sources.items():
        (tmp_path / f"examined_{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    offers = {name: Offer("precision", name, name, "1.0", f"examined_{name}:Plugin") for name in (*sources, "off")}
    twins = [offers["fine"], Offer("precision", "fine", "twin", "2.0", "examined_fine:Plugin")]
    found = {}
    # The first waits for PyTorch to be imported, which the others don't.
    for names, timeout in ((twins, 100.0), ([offers["raises"], offers["ends"]], 30.0), ([offers["hangs"]], 1.0)):
        for one in examine(Registry(names), timeout):
            found[one.distribution] = (one.kind, one.name, one.status, one.note)
    (off,) = examine(Registry([offers["off"]], disabled={"off"}), 1.0)
    assert (off.status, off.seconds) == ("switched off", 0.0)
    assert found["fine 1.0"] == (
        "precision",
        "fine",
        "conflict",
        'twin 2.0 offers the name too; choose with "fine/fine"',
    )
    assert found["twin 2.0"][3] == 'fine 1.0 offers the name too; choose with "twin/fine"'
    assert found["raises 1.0"][:3] == ("precision", "raises", "quarantined")
    assert "KeyError('key')" in found["raises 1.0"][3]
    assert found["ends 1.0"][2:] == ("crashed", "importing it ended the process: exit code 7")
    assert found["hangs 1.0"][2:] == ("hangs", "it took more than 1 s")


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
