"""The launchers read the environments of their schedulers, and name what is wrong in a malformed one."""

import socket
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_core.contracts import Launcher, ProcessInfo
from fabric_core.errors import LaunchError
from fabric_plugins.launchers import ElasticLauncher, EnvironmentLauncher, LSFLauncher, MPILauncher, SlurmLauncher, mpi
from fabric_plugins.launchers._variables import first_host

_SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "8",
}  # fmt: skip
_OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "2019753985", "PMIX_RANK": "3",
    "OMPI_MCA_orte_hnp_uri": "2019753984.0;tcp://10.0.0.7,10.1.0.7:41699;tcp6://[fd00::2]:47657",
}  # fmt: skip
_MPICH = {
    "PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2",
    "MASTER_PORT": "29500",
}  # fmt: skip
_LSF = {
    "LSB_JOBID": "5", "JSM_NAMESPACE_RANK": "2", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "0",
    "JSM_NAMESPACE_LOCAL_SIZE": "2", "LSB_MCPU_HOSTS": "batch5 1 a01 42 a02 42",
}  # fmt: skip
_KUBEFLOW = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
_TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0", "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
}  # fmt: skip

_ALL: list[tuple[type[Launcher], dict[str, str], tuple[int, int, int, int, int], str]] = [
    (SlurmLauncher, _SLURM, (5, 8, 1, 4, 1), "gpu03"),
    (MPILauncher, _OPEN_MPI, (3, 4, 1, 2, 1), "10.0.0.7"),
    (MPILauncher, _MPICH, (1, 2, 1, 2, 0), "127.0.0.1"),
    (LSFLauncher, _LSF, (2, 4, 0, 2, 1), "a01"),
    (EnvironmentLauncher, _KUBEFLOW, (1, 2, 0, 1, 1), "job-master-0"),
    (ElasticLauncher, _TORCHRUN, (1, 2, 1, 2, 0), "localhost"),
]
_IDS = ["slurm", "open-mpi", "mpich", "lsf", "kubeflow", "torchrun"]
_BAD = st.sampled_from(["", " ", "-1", "x", "1.5", "99", "99999999999999999999", "²", "1_0", "[", "a[1-", "4(x", "\0"])


_ALSO = (
    "MASTER_ADDR", "LSB_HOSTS", "SLURM_TASKS_PER_NODE", "SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_JOBID",
    "OMPI_MCA_ess_base_jobid", "PMI_FD",
)  # fmt: skip
"""What a launcher reads where another variable is missing."""


def _found(launcher: type[Launcher], environment: Mapping[str, str]) -> ProcessInfo:
    info = launcher().detect(environment)
    assert info is not None
    return info


@pytest.mark.parametrize(("launcher", "environment", "place", "host"), _ALL, ids=_IDS)
def test_place_is_read(
    launcher: type[Launcher], environment: dict[str, str], place: tuple[int, ...], host: str
) -> None:
    """Rank, world size, local rank, local world size, node rank and the host of rank 0."""
    info = _found(launcher, environment)
    read = (info.global_rank, info.world_size, info.local_rank, info.local_world_size, info.node_rank)
    assert (read, info.main_address) == (place, host)
    assert info.main_port > 0


@pytest.mark.parametrize(("launcher", "environment"), [one[:2] for one in _ALL], ids=_IDS)
@given(data=st.data())
def test_malformed_environment_is_an_error_that_names_a_variable(
    launcher: type[Launcher], environment: dict[str, str], data: Any
) -> None:
    """Whatever is missing or malformed: found all the same, not found, or a ``LaunchError`` that names a variable."""
    names = sorted(environment)
    missing = data.draw(st.sets(st.sampled_from(names), max_size=2))
    changed = data.draw(st.dictionaries(st.sampled_from(names), _BAD, max_size=2))
    given_now = {name: value for name, value in {**environment, **changed}.items() if name not in missing}
    message = ""
    try:
        info = launcher().detect(given_now)
        assert info is None or 0 <= info.global_rank < info.world_size
    except LaunchError as error:
        message = str(error)
    assert not message or any(name in message for name in {*environment, *_ALSO}), message


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"])
def test_incomplete_step_is_an_error(name: str) -> None:
    """A variable of a step that is missing is named."""
    environment = {key: value for key, value in _SLURM.items() if key != name}
    with pytest.raises(LaunchError, match=name if "TASKS" not in name else "TASKS_PER_NODE"):
        SlurmLauncher().detect(environment)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": ""},  # a batch script, or a shell of salloc
        {"SLURM_STEP_ID": "4294967290"},  # an interactive step
        {"SLURM_STEP_NUM_TASKS": "1"},  # a step of one task
    ],
)
def test_what_is_no_step_of_several_tasks_is_like_a_shell(change: dict[str, str]) -> None:
    """SLURM's variables stand there, and nobody started several processes."""
    assert SlurmLauncher().detect({**_SLURM, **change}) is None


@pytest.mark.parametrize(
    ("launcher", "two", "size"),
    [
        (
            SlurmLauncher,
            {**_SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "0",
             "SLURM_LOCALID": "0"},
            "SLURM_STEP_NUM_TASKS",
        ),
        (
            MPILauncher,
            {**_OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
            "OMPI_COMM_WORLD_SIZE",
        ),
        (MPILauncher, _MPICH, "PMI_SIZE"),
        (LSFLauncher, {**_LSF, "JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0"}, "JSM_NAMESPACE_SIZE"),
        (EnvironmentLauncher, {**_KUBEFLOW, "RANK": "0"}, "WORLD_SIZE"),
    ],
    ids=["slurm", "open-mpi", "mpich", "lsf", "kubeflow"],
)  # fmt: skip
def test_a_job_begins_with_two_processes(launcher: type[Launcher], two: dict[str, str], size: str) -> None:
    """Two are a job, and one alone is like a shell, which may start others."""
    assert _found(launcher, two).world_size == 2
    assert launcher().detect({**two, size: "1"}) is None


_UNEVEN = {**_SLURM, "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "3,2", "SLURM_NTASKS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("launcher", "environment", "name"),
    [
        (SlurmLauncher, _SLURM, "SLURM_STEP_NUM_TASKS"),
        (SlurmLauncher, _SLURM, "SLURM_STEP_NUM_NODES"),
        (SlurmLauncher, _SLURM, "SLURM_HET_SIZE"),
        (SlurmLauncher, _SLURM, "SLURM_NTASKS_PER_NODE"),
        (SlurmLauncher, _UNEVEN, "SLURM_NTASKS_PER_NODE"),
        (MPILauncher, _OPEN_MPI, "OMPI_COMM_WORLD_SIZE"),
        (MPILauncher, _OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        (MPILauncher, _MPICH, "PMI_SIZE"),
        (MPILauncher, _MPICH, "MPI_LOCALNRANKS"),
        (LSFLauncher, _LSF, "JSM_NAMESPACE_SIZE"),
        (LSFLauncher, _LSF, "JSM_NAMESPACE_LOCAL_SIZE"),
        (EnvironmentLauncher, _KUBEFLOW, "WORLD_SIZE"),
        (EnvironmentLauncher, {**_KUBEFLOW, "LOCAL_RANK": "0"}, "LOCAL_WORLD_SIZE"),
        (ElasticLauncher, _TORCHRUN, "WORLD_SIZE"),
        (ElasticLauncher, _TORCHRUN, "LOCAL_WORLD_SIZE"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_none_of_what_there_must_be_is_an_error(
    launcher: type[Launcher], environment: dict[str, str], name: str
) -> None:
    """No tasks, nodes or processes at all: the error names the variable, and the least that it can be."""
    with pytest.raises(LaunchError, match=f"{name} must be at least 1"):
        launcher().detect({**environment, name: "0"})


def test_what_won_over_tasks_per_node_is_told() -> None:
    """Where both options were given and say different numbers, the way to start leaves out the one that won."""
    both = {**_SLURM, "SLURM_NTASKS_PER_NODE": "2"}
    assert "without --ntasks (8 here), which wins over" in _found(SlurmLauncher, both).how_to_start
    for same in ({**_SLURM, "SLURM_NTASKS_PER_NODE": "4"}, _SLURM):
        assert "without" not in _found(SlurmLauncher, same).how_to_start


def test_tasks_divided_unevenly_are_explained() -> None:
    """``--ntasks`` that doesn't divide by the nodes says what to write."""
    with pytest.raises(LaunchError, match=r"--ntasks=5 beside --ntasks-per-node=4 unevenly"):
        SlurmLauncher().detect(_UNEVEN)


def test_port_belongs_to_the_job_and_a_given_one_wins() -> None:
    """All ranks of a step derive one port, another step another, and ``MASTER_PORT`` is taken as it is."""
    mine, same = _found(SlurmLauncher, _SLURM), _found(SlurmLauncher, {**_SLURM, "SLURM_PROCID": "0"})
    other = _found(SlurmLauncher, {**_SLURM, "SLURM_STEP_ID": "1"})
    assert (mine.main_port, mine.job_id) == (same.main_port, same.job_id)
    assert other.job_id != mine.job_id
    fixed = _found(SlurmLauncher, {**_SLURM, "MASTER_PORT": "12345", "MASTER_ADDR": "10.1.1.1"})
    assert (fixed.main_address, fixed.main_port, fixed.job_id) == ("10.1.1.1", 12345, "")


@pytest.mark.parametrize(
    "environment",
    [
        {"PMIX_RANK": "0"},
        {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2"},
        {"PALS_RANKID": "0"},
        {"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2"},
        {"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "2"},
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2"},
    ],
    ids="+".join,
)
def test_one_of_several_processes_that_nobody_recognises_is_an_error(environment: dict[str, str]) -> None:
    """It names a variable and the ways to start; never do several processes train alone."""
    with pytest.raises(LaunchError) as caught:
        EnvironmentLauncher().detect(environment)
    assert any(name in str(caught.value) for name in [*environment, "WORLD_SIZE", "RANK"])


@pytest.mark.parametrize(
    "environment",
    [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "1"}, {"WORLD_SIZE": "1"}],
    ids=str,
)
def test_one_process_is_like_a_shell(environment: dict[str, str]) -> None:
    """Where the variables say that there is one process, it may start others."""
    assert EnvironmentLauncher().detect(environment) is None


_MANAGER = {
    "init": "cmd=response_to_init rc=0 pmi_version=1 pmi_subversion=1",
    "get_my_kvsname": "cmd=my_kvsname kvsname=job-7",
    "put": "cmd=put_result rc=0",
    "barrier_in": "cmd=barrier_out",
    "get": "cmd=get_result rc=0 value=node0",
}
_JOB = ["init", "get_my_kvsname"]


@pytest.mark.parametrize(
    ("given_too", "nodes", "asked", "address"),
    [
        ({"MASTER_ADDR": "mine", "MASTER_PORT": "7"}, 2, [], "mine"),
        ({"MASTER_PORT": "7"}, 1, [], "127.0.0.1"),
        ({"MASTER_PORT": "7"}, 2, [*_JOB, "barrier_in", "get"], "node0"),
        ({"MASTER_ADDR": "mine"}, 2, _JOB, "mine"),
        ({}, 2, [*_JOB, "barrier_in", "get"], "node0"),
        ({}, 1, _JOB, "127.0.0.1"),
    ],
    ids=["both, two nodes", "port", "port, two nodes", "address, two nodes", "nothing, two nodes", "nothing"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_mpich_is_asked_for_what_nobody_gave(
    given_too: dict[str, str], nodes: int, asked: list[str], address: str, rank: int
) -> None:
    """Its process manager knows the job, and on several nodes the host of rank 0, which rank 0 tells it."""
    ours, theirs = socket.socketpair()
    seen: list[str] = []

    def answer() -> None:
        for line in theirs.makefile():
            seen.append(line.split()[0].removeprefix("cmd="))
            theirs.sendall(f"{_MANAGER[seen[-1]]}\n".encode())

    manager = Thread(target=answer)
    manager.start()
    place = {"PMI_RANK": str(rank), "MPI_LOCALRANKID": str(rank % (2 // nodes)), "MPI_LOCALNRANKS": str(2 // nodes)}
    environment = {"PMI_SIZE": "2", "PMI_FD": str(ours.fileno()), **place, **given_too}
    mpi._ask_manager.cache_clear()
    with theirs:
        with ours:
            info = _found(MPILauncher, environment)
        manager.join()
    assert seen == [*asked[:2], *(["put"] if rank == 0 and len(asked) > 2 else []), *asked[2:]]
    assert (info.main_address, info.global_rank, info.node_rank) == (address, rank, rank if nodes == 2 else 0)
    assert (info.main_port == 7) == ("MASTER_PORT" in given_too)


def test_rank_file_of_lsf_and_node_file_of_pbs_are_read(tmp_path: Path) -> None:
    """The first host that computes is where the ranks meet."""
    file = tmp_path / "hosts"
    file.write_text("batch5\nb07\nb07\nb08\n")
    assert _found(LSFLauncher, {**_LSF, "LSB_DJOB_RANKFILE": str(file)}).main_address == "b07"
    assert _found(MPILauncher, {**_OPEN_MPI, "PBS_NODEFILE": str(file)}).main_address == "batch5"
    with pytest.raises(LaunchError, match="LSB_DJOB_RANKFILE"):
        LSFLauncher().detect({**_LSF, "LSB_DJOB_RANKFILE": str(tmp_path / "missing")})


@pytest.mark.parametrize(
    ("nodelist", "found"),
    [
        ("node7", ("node7", 1)),
        ("node[03-05,9],login", ("node03", 5)),
        ("r[1-2]c[10-12]", ("r1c10", 6)),
        ("a,b,c", ("a", 3)),
        ("x-[0-999999999]", ("x-0", 1000000000)),
        ("", None),
        ("a[3-1]", None),
        ("a[", None),
        ("a]", None),
        (",a", None),
        ("a b", None),
        ("a[1,]", None),
    ],
)
def test_compressed_lists_of_hosts_are_expanded(nodelist: str, found: tuple[str, int] | None) -> None:
    """The first host, and how many there are; nothing is enumerated."""
    assert first_host(nodelist) == found
