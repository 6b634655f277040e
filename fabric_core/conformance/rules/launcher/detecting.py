"""Rules for launchers: what a process finds that something started."""

import os
import socket
from collections.abc import Mapping
from typing import Final

import torch

from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.launcher.measures import set_up_and_undo
from fabric_core.contracts import ProcessInfo
from fabric_core.errors import LaunchError

TABLE: Final = Table("launcher")

_FOREIGN: Final[tuple[Mapping[str, str], ...]] = (
    {},
    {"PATH": "/bin", "HOME": "/root"},
    {"LANG": "C", "TERM": "dumb", "SHLVL": "1"},
)


@TABLE.rule(
    "LAU-501",
    "`detect` returns `None` where its system did not start the process.",
    reason="Every launcher is asked, in every process.",
    advice="return None where your system's variables are absent",
)
def _foreign(bench: Bench) -> None:
    for environment in _FOREIGN:
        found = bench.plugin().detect(dict(environment))
        if found is not None:
            raise Broken(f"in {environment} it finds {found}")


@TABLE.rule(
    "LAU-502",
    "`detect` reads the environment that it is given, and changes neither that nor the process's own.",
    reason="Asking must have no effect.",
    advice="read from the argument, and set nothing",
)
def _detect_is_pure(bench: Bench) -> None:
    for environment in (*_FOREIGN, dict(os.environ)):
        given, before = dict(environment), dict(os.environ)
        try:
            bench.plugin().detect(given)
        except LaunchError:
            continue
        if given != environment or dict(os.environ) != before:
            raise Broken("it changes the environment")


def _detect(place: Place) -> ProcessInfo | None:
    found: ProcessInfo | None = place.plugin().detect(dict(os.environ))
    return found


@TABLE.rule(
    "LAU-503",
    "The ranks of one job are numbered from 0, each once, and know how many there are: one is the global zero.",
    reason="Two rank zeros write one checkpoint.",
    advice="read the global rank, not the local one",
    needs=("detects",),
    world_sizes=(1, 2),
)
def _ranks(bench: Bench) -> None:
    found = bench.run(_detect)
    ranks = [None if one is None else (one.global_rank, one.world_size) for one in found]
    if ranks != [(rank, bench.world_size) for rank in range(bench.world_size)]:
        raise Broken(f"the ranks see themselves as {ranks}")


def _on_nodes(rank: int) -> dict[str, str]:
    """Give the variables of one of four ranks on two nodes."""
    local = {"RANK": rank, "LOCAL_RANK": rank % 2, "GROUP_RANK": rank // 2}
    counts = {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 2}
    return {**os.environ, **{name: str(value) for name, value in {**local, **counts}.items()}}


def _detect_on_nodes(place: Place) -> list[tuple[int, ...]]:
    """Look at four ranks on two nodes, one after the other."""
    seen: list[tuple[int, ...]] = []
    plugin = place.plugin()
    for rank in range(4):
        found = plugin.detect(_on_nodes(rank))
        seen.append((found.global_rank, found.local_rank, found.node_rank, found.world_size, found.local_world_size))
    return seen


@TABLE.rule(
    "LAU-511",
    "Where ranks are spread over nodes, each knows its rank on its node, the node, and how many are on it.",
    reason="The rank on the node chooses the device: two ranks on one device are slow, or out of memory.",
    advice="read the local rank, the node's rank and the number on the node from variables of their own",
    needs=("detects", "multi_node"),
)
def _nodes(bench: Bench) -> None:
    seen = bench.run(_detect_on_nodes)[0]
    expected = [(rank, rank % 2, rank // 2, 4, 2) for rank in range(4)]
    if seen != expected:
        raise Broken(f"of four ranks on two nodes global rank, local rank, node and both counts are {seen}")


@TABLE.rule(
    "LAU-504",
    "Variables of its own system that contradict each other, say what is impossible, or are missing, raise LaunchError "
    "and nothing else.",
    reason="A job that was started half-way must say so.",
    advice="raise LaunchError for what can't be read or can't be, and for nothing else",
    needs=("detects",),
    world_sizes=(1,),
)
def _incomplete(bench: Bench) -> None:
    fault = bench.run(_detect_damaged)[0] or bench.run(_detect_impossible)[0]
    if fault:
        raise Broken(fault)


def _detect_damaged(place: Place) -> str | None:
    plugin, whole = place.plugin(), dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        for damaged in ({**whole, name: "x"}, {key: value for key, value in whole.items() if key != name}):
            try:
                plugin.detect(damaged)
            except LaunchError:
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the wrong one
                return f"with {name} damaged it raises {error!r}"
    return None


def _detect_impossible(place: Place) -> str | None:
    plugin = place.plugin()
    for change in _IMPOSSIBLE:
        try:
            found = plugin.detect({**_on_nodes(0), **change})
        except LaunchError:
            continue
        if not _possible(found):
            return f"of four ranks on two nodes, with {change}, it finds {found}"
    for port in ("1", "65535"):
        plugin.detect({**_on_nodes(0), "MASTER_PORT": port})
    return None


_IMPOSSIBLE: Final[tuple[Mapping[str, str], ...]] = (
    {"RANK": "4"},
    {"RANK": "-1"},
    {"LOCAL_RANK": "2"},
    {"GROUP_RANK": "2"},
    {"WORLD_SIZE": "0"},
    {"MASTER_PORT": "0"},
    {"MASTER_PORT": "65536"},
)


def _possible(found: ProcessInfo | None) -> bool:
    """Say whether a process may have this place; one that meets no others needs no port."""
    if found is None:
        return True
    places = (found.global_rank, found.world_size), (found.local_rank, found.local_world_size)
    nodes = found.world_size // max(1, found.local_world_size)
    every = (*places, (found.node_rank, nodes), *([(found.main_port - 1, 65_535)] if found.world_size > 1 else []))
    return all(0 <= rank < count for rank, count in every)


def _detect_restarts(place: Place) -> tuple[int, int, int]:
    plugin = place.plugin()
    again = plugin.detect({**os.environ, "TORCHELASTIC_RESTART_COUNT": "3"}).attempt
    first = plugin.detect(dict(os.environ)).attempt
    unsaid = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RESTART_COUNT"}
    return first, again, plugin.detect(unsaid).attempt


@TABLE.rule(
    "LAU-513",
    "`detect` says how often the ranks were restarted: not at all where nothing says so.",
    reason="What the ranks of a failed attempt left at the store is not meant for those after them.",
    advice="read the number of restarts; 0 where the variable is absent",
    needs=("detects",),
)
def _restarts(bench: Bench) -> None:
    first, again, unsaid = bench.run(_detect_restarts)[0]
    if (first, again, unsaid) != (0, 3, 0):
        raise Broken(f"after none, three and an unknown number of restarts it counts {first}, {again} and {unsaid}")


def _meet(place: Place, port: int) -> list[tuple[bool, list[int]]]:
    """Join the others at the store of whoever started the ranks, and at one that rank 0 makes.

    Returns:
        For both, whether it takes the store for the starter's, and whom it met.
    """
    seen = []
    for own in ({}, {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}):
        os.environ.update(own)
        with place.unlaunched() as fabric:
            fabric.launch()
            met = fabric.all_gather(torch.tensor(fabric.global_rank)).tolist()
            seen.append((place.plugin().detect(dict(os.environ)).agent_store, met))
            fabric.barrier()
    return seen


@TABLE.rule(
    "LAU-514",
    "Ranks meet where `detect` says: at the store of whoever started them, or at one that rank 0 makes.",
    reason="Where nobody serves the store, or two do, training never begins.",
    advice="set agent_store where the process that started the ranks serves main_port, and nowhere else",
    needs=("detects",),
    world_sizes=(2,),
)
def _meets(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for rank, seen in enumerate(bench.run_apart(_meet, port)):
        if seen != [(True, [0, 1]), (False, [0, 1])]:
            raise Broken(
                f"at the starter's store and at rank 0's, rank {rank} takes it for the starter's, and meets: {seen}"
            )


def _set_up(place: Place) -> list[str]:
    """Take part, and undo it, as one of more ranks than there are cores; say what is wrong."""
    plugin = place.plugin()
    return set_up_and_undo(plugin, plugin.detect(dict(os.environ)))


@TABLE.rule(
    "LAU-515",
    "`teardown` undoes what `setup_process` set, which takes more ranks than cores, and OMP_NUM_THREADS as it is.",
    reason="A rank may go on without Fabric; and how many threads there are is the user's, who said it.",
    advice="note what was, and restore it; set no threads where OMP_NUM_THREADS is set",
    needs=("detects",),
    inside=False,
)
def _undoes(bench: Bench) -> None:
    found = bench.run_apart(_set_up)[0]
    if found:
        raise Broken("; ".join(found))


@TABLE.rule(
    "LAU-507",
    "`teardown` may be called without `setup_process`, and twice.",
    reason="What failed half-way is torn down too.",
    advice="let teardown look at what there is to release",
)
def _teardown(bench: Bench) -> None:
    plugin = bench.plugin()
    plugin.teardown()
    plugin.teardown()


_SCHEDULERS: Final[tuple[Mapping[str, str], ...]] = (
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
    {"PMI_RANK": "x", "LSB_JOBID": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    {"RANK": "", "WORLD_SIZE": "two"},
)
"""What jobs of several systems leave in the environment, whole and half."""


@TABLE.rule(
    "LAU-510",
    "What jobs of other systems left in the environment gives nothing, a place that is possible, or LaunchError.",
    reason="Variables of a scheduler stay in shells, containers and notebooks.",
    advice="ask for every variable that you need, and check that ranks are below their numbers",
)
def _left_over(bench: Bench) -> None:
    for environment in _SCHEDULERS:
        try:
            found = bench.plugin().detect(dict(environment))
        except LaunchError:
            continue
        except Exception as error:
            raise Broken(f"in {dict(environment)} it raises {error!r}") from error
        if found is not None and not (
            0 <= found.global_rank < found.world_size and 0 <= found.local_rank < found.local_world_size
        ):
            raise Broken(f"in {dict(environment)} it finds {found}")
