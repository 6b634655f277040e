"""How the ranks of ``fabric-core doctor`` meet, what they measure together, and what is printed.

[Note: who says it] Rank 0 prints what all found out; a rank that doesn't find rank 0 prints what it found out itself.
Ranks tell each other through the store, without a collective, until all of them are there. A timer ends each rank that
is stuck, rank 0 first, which names whoever is behind.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from typing import Any, Final, NoReturn, TypeVar

from torch.distributed import PrefixStore, Store

from fabric_core.assembly import Assembly
from fabric_core.choosing.registry import Registry
from fabric_core.cli._asking import find_registry
from fabric_core.cli._doctor import SOUND, examine
from fabric_core.cli._facts import Fault, judge_facts, node_of, rank_of
from fabric_core.cli._links import judge_links, measure_compute, measure_pairs, measure_together
from fabric_core.cli._output import Exit, print_json, print_table, print_text, progress
from fabric_core.collectives import ProcessGroup, ProcessInfo
from fabric_core.contracts import Accelerator, Launcher, Strategy
from fabric_core.errors import FabricError
from fabric_core.running.launching import check_connected, make_world
from fabric_core.running.meeting import meet

__all__ = ["Job", "examine_node", "meet_others"]

T = TypeVar("T")

_POLL: Final = 0.05
_LOOK: Final = 1.0
_ARRIVE: Final = 0.35
"""Which part of the time the ranks have to come."""
_LEAVE: Final = {"plugins": 20.0, "measuring": 10.0, "rank 0": 5.0, "others": 2.0}
"""How many seconds are left when each of these must have ended."""
_STAGES: Final = ("did not come", "came", "examined plugins", "connected", "measured all-reduce", "measured all")


@dataclass
class Job:
    """What this rank knows so far, and prints when it ends.

    Args:
        info: This process's place.
        deadline: When it ends, whatever happens, by ``time.monotonic``.
        as_json: Print JSON.
        limits: From how many milliseconds on, and below how many MB/s, a link is slow.
        assembly: The plan, and its plugins.
        ranks: What is known of each rank.
        plugins: What is to be said of the plugins, by node.
        together: The all-reduces.
        links: The pairs.
        faults: What else is wrong.
        printing: Held by who prints.
    """

    info: ProcessInfo
    deadline: float
    as_json: bool
    limits: tuple[float, float]
    assembly: Assembly
    ranks: dict[int, dict[str, Any]] = field(default_factory=dict)
    plugins: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    together: list[dict[str, Any]] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    printing: Any = field(default_factory=threading.Lock)

    def left(self) -> float:
        """Give the seconds until this rank ends, whatever happens."""
        return self.deadline - time.monotonic()

    @cached_property
    def registry(self) -> Registry:
        """What is installed here."""
        return find_registry()

    def say(self) -> bool:
        """Print all that is known, once; gives whether nothing is broken."""
        self.printing.acquire()  # and never released: whoever comes second waits for the end
        broken = [finding for own in self.plugins.values() for finding in own if finding["status"] not in SOUND]
        found = [Fault(f"plugin {one['name']}", f"{one['status']}: {one['note']}", "plugins doctor") for one in broken]
        links = judge_links(self.links, self.ranks, *self.limits)
        faults = [*dict.fromkeys((*self.faults, *judge_facts(self.ranks.values()), *found, *links))]
        if self.as_json:
            report = {
                "sound": not faults,
                "seen_by": self.info.global_rank,
                "world_size": self.info.world_size,
                "started_by": self.info.owner or None,
                "faults": [asdict(fault) for fault in faults],
                "ranks": [self.ranks[rank] for rank in sorted(self.ranks)],
                "plugins": self.plugins,
                "all_reduce": self.together,
                "links": self.links,
            }
            print_json(report, plain=True)  # mpirun gives rank 0 a terminal, whoever reads its own output
        else:
            self._print(faults)
        sys.stdout.flush()
        return not faults

    def _print(self, faults: list[Fault]) -> None:
        known = [self.ranks[rank] for rank in sorted(self.ranks)]
        rows = [
            (str(one["rank"]), str(one["node"]), one["host"], one.get("device", ""), one["python"], one["torch"],
             one["plan"] or "none", " ".join(f"{name['name']} {name['seconds'] * 1e3:.1f} ms" for name in
             one["names"].values()), f"{one.get('clock') or 0:+.3f} s")
            for one in known
        ]  # fmt: skip
        print_table(("rank", "node", "host", "device", "python", "torch", "plan", "names resolved in", "clock"), rows)
        nodes = [
            (node_of(one), f"{one['free_bytes'].get('temporary', 0) / 1e9:.1f}",
             f"{one['free_bytes'].get('shared', 0) / 1e9:.1f}", str(one["limits"]["open_files"]),
             str(one["limits"]["locked_memory"] or "unlimited"))
            for one in known if one["local_rank"] == 0
        ]  # fmt: skip
        print_table(("node", "temporary GB free", "shared GB free", "open files", "locked memory, bytes"), nodes)
        measured = [("all-reduce", *_sizes(self.together))] if self.together else []
        measured += [("{} - {}".format(*link["ranks"]), *_sizes(link["sizes"])) for link in self.links]
        if measured:
            print_table(("ranks", *(f"{one['bytes']} bytes" for one in self.together)), measured)
        for node, own in self.plugins.items():
            print_text(f"{node}: {len(own)} plugins, {sum(one['status'] in SOUND for one in own)} sound")
        for fault in faults:
            print_text(f"{fault.where}: {fault.what}\n  instead: {fault.instead}", style="red")
        print_text("something is broken" if faults else "all is sound")


def _sizes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [f"{one['seconds'] * 1e3:.2f} ms, {one['bytes_per_second'] / 1e6:.1f} MB/s" for one in rows]


def examine_node(job: Job) -> dict[str, list[dict[str, Any]]]:
    """Examine the plugins of this node, as far as there is time."""
    findings = []
    for finding in examine(job.registry, 10.0, shown=job.info.global_rank == 0):
        findings.append(asdict(finding))
        if job.left() < _LEAVE["plugins"]:
            break
    return {node_of(job.ranks[job.info.global_rank]): findings}


def meet_others(job: Job, launcher: Launcher) -> bool:
    """Meet the others, and find out with them what is broken; gives whether nothing is ([Note: who says it])."""
    info, own = job.info, job.ranks[job.info.global_rank]
    store = None
    if own["names"]["main"]["error"] is None:
        try:
            store = meet(info, timedelta(seconds=max(5.0, job.left() * _ARRIVE)))
        except (FabricError, RuntimeError, OSError) as error:
            what = f"it did not find rank 0 at {info.main_address}: {str(error).partition(chr(10))[0]}"
            job.faults.append(Fault(rank_of(own), what, "see whether rank 0 runs, and at the network between them"))
    if store is None:
        _end(sound=job.say())
    copies: Any = store  # PyTorch types not all methods of a store; each thread has one of its own
    told, asked = (PrefixStore(f"doctor/{info.attempt}", copies.clone()) for _ in range(2))
    timer = _Timer(job, asked)
    try:
        launcher.setup_process(info)
        sound = _take_part(job, launcher, told, store)
    finally:
        timer.cancel()
    launcher.teardown()
    return sound


def _take_part(job: Job, launcher: Launcher, told: Store, store: Store) -> bool:
    rank, first = job.info.global_rank, job.info.global_rank == 0
    told.set(f"facts/{rank}", json.dumps(job.ranks[rank]))
    _reach(told, rank, 1)
    if first:
        go = _wait_for_all(job, launcher, told)
        told.set("go", "measure" if go else "end")
    _wait(told, "go")
    if job.info.local_rank == 0:
        told.set(f"plugins/{rank}", json.dumps(examine_node(job)))
    _reach(told, rank, 2)
    failed = False
    if told.get("go") == b"measure":
        try:
            found = _measure(job, told, store)
        except Exception as error:  # noqa: BLE001 - whatever breaks is what is looked for
            failed = True
            found = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        told.set(f"found/{rank}", json.dumps(found))
    if first:
        _collect(job, told)
        sound = job.say()
        told.set("verdict", "sound" if sound else "broken")
        others, until = job.ranks.keys() - {0}, time.monotonic() + _LEAVE["others"]
        while not all(told.check([f"gone/{other}"]) for other in others) and time.monotonic() < until:
            time.sleep(_POLL)
    else:
        _wait(told, "verdict")
        sound = told.get("verdict") == b"sound"
        told.set(f"gone/{rank}", "")
    if failed:
        _end(sound=sound)  # the process group would wait for the others
    return sound


def _wait_for_all(job: Job, launcher: Launcher, told: Store) -> bool:
    """Wait for the others' facts, as long as they may take; gives whether anything can be measured."""
    missing = set(range(1, job.info.world_size))
    began = looked = time.monotonic()
    patience = max(5.0, job.left() * _ARRIVE)
    job.ranks[0]["late"] = 0.0
    with progress("waiting for ranks", len(missing)) as advance:
        while missing and time.monotonic() - began < patience:
            for rank in [one for one in missing if told.check([f"facts/{one}"])]:
                job.ranks[rank] = {**json.loads(told.get(f"facts/{rank}")), "late": time.monotonic() - began}
                missing.discard(rank)
                advance(1, "")
            time.sleep(_POLL)
            if missing and time.monotonic() - looked > _LOOK:
                looked = time.monotonic()
                try:
                    launcher.check_peers(job.info)
                except FabricError as error:
                    job.faults.append(Fault("starting the ranks", error.what, error.instead or "see what it printed"))
                    break
    for rank in sorted(missing):
        what = f"it did not come within {time.monotonic() - began:.0f} s: it is silent, or was never started"
        job.faults.append(Fault(f"rank {rank}", what, "see whether it runs, and what it printed"))
    plans = {one["plan"] for one in job.ranks.values()}
    return not missing and len(plans) == 1 and None not in plans


def _measure(job: Job, told: Store, store: Store) -> dict[str, Any]:
    """Connect as ``fabric.launch()`` does, and measure."""
    chosen, rank = job.assembly.chosen, job.info.global_rank
    accelerator: Accelerator = chosen.one("accelerator")
    strategy: Strategy = chosen.one("strategy")
    patience = timedelta(seconds=max(5.0, job.left() - 1.5 * _LEAVE["measuring"]))
    shared = PrefixStore(f"doctor-world/{job.info.attempt}", store)
    world = replace(
        make_world(job.info, chosen.plan, accelerator, strategy, patience), open_store=lambda: shared, timeout=patience
    )
    with ExitStack() as undo:
        undo.callback(accelerator.teardown)
        accelerator.setup_device(world.device)
        undo.enter_context(world.closing)
        undo.callback(strategy.teardown)
        collectives = strategy.connect(world, chosen.one("precision").policy)
        check_connected(collectives, world, strategy)
        group = ProcessGroup(world)
        _reach(told, rank, 3)
        found: dict[str, Any] = {"device": str(world.device), "compute": measure_compute(world, accelerator)}
        found["together"] = measure_together(collectives, world)
        _reach(told, rank, 4)
        found["links"] = list(measure_pairs(group, world, lambda: job.left() - _LEAVE["measuring"]))
        _reach(told, rank, 5)
    return found


def _collect(job: Job, told: Store) -> None:
    """Take what the others found out, as far as they tell in time; name who is silent."""
    measured = told.get("go") == b"measure"
    wanted = {f"plugins/{rank}" for rank, one in job.ranks.items() if one["local_rank"] == 0}
    wanted |= {f"found/{rank}" for rank in job.ranks} if measured else set()
    while wanted and job.left() > _LEAVE["rank 0"] + 1:
        for key in [one for one in wanted if told.check([one])]:
            wanted.discard(key)
            kind, rank = key.split("/")
            found = json.loads(told.get(key))
            if kind == "plugins":
                job.plugins.update(found)
                continue
            one = job.ranks[int(rank)]
            if "failed" in found:
                what, instead = found["failed"], "see which rank is silent, and at the network"
                job.faults.append(Fault(rank_of(one), f"forming the world failed: {what}", instead))
                continue
            one |= {"device": found["device"], "compute": found["compute"]}
            job.together = found["together"] if rank == "0" else job.together
            for other, sizes, clock in found["links"]:
                job.links.append({"ranks": [int(rank), other], "sizes": sizes})
                if clock is not None:
                    job.ranks[other]["clock"] = clock
        time.sleep(_POLL)
    job.links.sort(key=lambda link: link["ranks"])
    job.plugins = dict(sorted(job.plugins.items()))
    job.faults += _behind(told, job.ranks) if wanted or any("failed" in one.what for one in job.faults) else []


def _behind(told: Store, ranks: Mapping[int, Mapping[str, Any]]) -> list[Fault]:
    """Name the ranks that didn't get as far as the others."""
    stages = {rank: int(told.get(f"stage/{rank}")) if told.check([f"stage/{rank}"]) else 0 for rank in ranks}
    most = max(stages.values())
    return [
        Fault(rank_of(ranks[rank]), f"it is silent: the last that it did was that it {_STAGES[stage]}, and others"
              f" {_STAGES[most]}", "see what it does there (py-spy dump --pid), and what it printed")
        for rank, stage in stages.items() if stage < most
    ]  # fmt: skip


def _reach(told: Store, rank: int, stage: int) -> None:
    told.set(f"stage/{rank}", str(stage))


def _wait(told: Store, key: str) -> None:
    """Wait until a key is there; the timer ends this rank where it never is."""
    while not told.check([key]):
        time.sleep(_POLL)


class _Timer:
    """Ends this rank when the time is over, and says why where rank 0 doesn't."""

    def __init__(self, job: Job, told: Store) -> None:
        left = _LEAVE["rank 0" if job.info.global_rank == 0 else "others"]
        self._job, self._told = job, told
        self._timer = threading.Timer(max(1.0, job.left() - left), self._end)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Let this rank end by itself."""
        self._timer.cancel()

    def _end(self) -> None:
        job = self._job
        verdict = _ask(lambda: self._told.get("verdict") if self._told.check(["verdict"]) else b"")
        if verdict:
            _end(sound=verdict == b"sound")
        behind = _ask(lambda: _behind(self._told, job.ranks))
        if behind is None or job.info.global_rank > 0:
            behind = [
                Fault("rank 0", "it is silent", "see what it does there (py-spy dump --pid), and what it printed")
            ]
        job.faults += behind or [Fault("this job", "it did not end in time", "--within, with more seconds")]
        job.say()
        _end(sound=False)


def _ask(question: Callable[[], T]) -> T | None:
    """Ask the store, which may have ended or be stuck; gives nothing then."""
    answers: list[T] = []

    def ask() -> None:
        answers.append(question())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_LOOK)
    return answers[0] if answers else None


def _end(*, sound: bool) -> NoReturn:
    """End the process at once, whatever it waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(Exit.YES if sound else Exit.NO)
