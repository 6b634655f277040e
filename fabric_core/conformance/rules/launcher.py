"""Rules for launchers."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from fabric_core.conformance import snapshot
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.pool import VARIABLES
from fabric_core.conformance.rule import Broken, Table
from fabric_core.contracts import LaunchOrder, ProcessInfo
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


def _detect_on_nodes(place: Place) -> list[tuple[int, ...]]:
    """Look at four ranks on two nodes."""
    seen: list[tuple[int, ...]] = []
    for rank in range(4):
        local = {"RANK": rank, "LOCAL_RANK": rank % 2, "GROUP_RANK": rank // 2}
        counts = {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 2}
        given = {name: str(value) for name, value in {**local, **counts}.items()}
        found = place.plugin().detect({**os.environ, **given})
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
    "Variables of its own system that contradict each other, or are missing, raise LaunchError and nothing else.",
    reason="A job that was started half-way must say so.",
    advice="raise LaunchError for what can't be read",
    needs=("detects",),
    world_sizes=(1,),
)
def _incomplete(bench: Bench) -> None:
    fault = bench.run(_detect_damaged)[0]
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


def _answer(one: int, other: int) -> int:
    return one + other


def _fail() -> None:
    raise ZeroDivisionError("the kit's own")


def _start(place: Place, function: Callable[..., Any], *args: Any) -> Any:
    """Start a function as a script does that nothing has launched."""
    for name in VARIABLES:
        del os.environ[name]
    try:
        return place.plugin().start(LaunchOrder(processes=1, function=function, args=args))
    except Exception as error:  # noqa: BLE001 - what it raises is what is asked
        return f"raised {type(error).__name__}"


@TABLE.rule(
    "LAU-505",
    "`start` runs the function with its arguments, and gives what it returned on rank 0.",
    reason="Notebooks get their trained model back by it.",
    advice="pass order.args on, and return rank 0's result",
    inside=False,
)
def _returns(bench: Bench) -> None:
    result = bench.fresh(_start, _answer, 40, 2)
    if result != 42:
        raise Broken(f"it gives {result!r}, and the function returned 42")


@TABLE.rule(
    "LAU-506",
    "`start` raises where the function raised.",
    reason="A failed training must not look like one that ended.",
    advice="raise RankFailedError with the rank's traceback",
    inside=False,
)
def _raises(bench: Bench) -> None:
    result = bench.fresh(_start, _fail)
    if not str(result).startswith("raised"):
        raise Broken(f"it gives {result!r}")


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


def _start_several(place: Place, fails: int | None) -> Any:
    """Start a function on two ranks, as a script does that nothing launched; say what came of it, and what is left."""
    for name in VARIABLES:
        os.environ.pop(name, None)
    before = snapshot.take()
    order = LaunchOrder(processes=2, function=_as_rank, args=(place, fails))
    try:
        result = place.plugin().start(order)
    except LaunchError as error:
        # A failing rank is another error, of which this is no base.
        return "refused", str(error), []
    except Exception as error:  # noqa: BLE001 - what it raises is what is asked
        result = f"raised {type(error).__name__}"
    # PyTorch's own engine draws a port from Python's generator; the process that starts others trains nothing itself.
    return "ran", result, [name for name in snapshot.differences(before) if not name.startswith("the random state")]


def _as_rank(place: Place, fails: int | None) -> Any:
    info = place.plugin().detect(dict(os.environ))
    rank = -1 if info is None else info.global_rank
    if rank == fails:
        raise ZeroDivisionError("the kit's own")
    return rank, None if info is None else info.world_size, b"x" * 3_000_000


@TABLE.rule(
    "LAU-508",
    "Who starts several processes gives what the function returned on rank 0, however large, and leaves the process "
    "that started them as it was; who can't, refuses with LaunchError.",
    reason="A notebook goes on after a training, in the same process.",
    advice="wait for every rank, return rank 0's result, and undo what was set; or raise LaunchError at once",
    inside=False,
)
def _several(bench: Bench) -> None:
    outcome, result, left = bench.fresh(_start_several, None)
    if outcome == "refused":
        return
    if not isinstance(result, tuple) or result[0] not in {0, -1} or len(result[2]) != 3_000_000:
        raise Broken(f"it gives {repr(result)[:100]}, and rank 0 returned its rank, the number of ranks and 3 MB")
    if left:
        raise Broken(f"it leaves {', '.join(left)} changed")


@TABLE.rule(
    "LAU-509",
    "A rank that fails, whichever, makes `start` raise, and no process is left.",
    reason="A training in which one rank is gone must not look like one that ended.",
    advice="end the other ranks, wait for them, and raise RankFailedError",
    inside=False,
)
def _one_fails(bench: Bench) -> None:
    outcome, result, left = bench.fresh(_start_several, 1)
    if outcome == "refused":
        return
    if not str(result).startswith("raised"):
        raise Broken(f"rank 1 failed, and it gives {repr(result)[:100]}")
    if left:
        raise Broken(f"after rank 1 failed it leaves {', '.join(left)} changed")


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
