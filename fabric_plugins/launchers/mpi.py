"""Processes by MPI: ``mpirun`` or ``mpiexec`` starts them, each joins. No MPI library is used, or needed."""

import os
import select
import socket
import stat
from collections.abc import Mapping
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, Final

from fabric_core.contracts import LauncherCapabilities, LaunchOrder, ProcessInfo
from fabric_core.errors import LaunchError
from fabric_plugins.launchers._ranks import JoinedLauncher
from fabric_plugins.launchers._variables import LOOPBACK, Variables, first_host

__all__ = ["MPILauncher"]

_HOW: Final = "mpirun with as many processes as nodes times devices: {nodes} x {devices}"
_PATIENCE: Final = 300.0
"""How many seconds the process manager may take to answer: it waits for the slowest process to begin."""
_NAMES: Final = 4096
"""How many bytes an answer of the process manager may have."""


class MPILauncher(JoinedLauncher):
    """Recognises the processes of Open MPI's ``mpirun``, and of MPICH's, Intel MPI's and MVAPICH's Hydra."""

    capabilities = LauncherCapabilities(multi_node=True)

    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        """Recognise a job of several processes."""
        if environment.get("OMPI_COMM_WORLD_RANK"):
            return _open_mpi(environment)
        # PMI_RANK alone is srun's: its tasks have no MPI_LOCALRANKID.
        if environment.get("PMI_RANK") and not ("MPI_LOCALRANKID" not in environment and "SLURM_PROCID" in environment):
            return _hydra(environment)
        return None

    def start(self, order: LaunchOrder) -> Any:
        """Refuse: ``mpirun`` starts the processes."""
        raise LaunchError(
            "this launcher starts nothing: mpirun does",
            where="fabric.launch()",
            instead=f"mpirun -np {order.nodes * order.processes} python script.py",
        )


def _open_mpi(environment: Mapping[str, str]) -> ProcessInfo | None:
    mpi = Variables(environment, "Open MPI", "start with mpirun, or unset OMPI_COMM_WORLD_RANK")
    if mpi.number("OMPI_COMM_WORLD_SIZE", low=1) == 1:
        return None
    rank, size, local_rank, local_size = mpi.place(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    )
    job = mpi.text("PMIX_NAMESPACE" if "PMIX_NAMESPACE" in mpi else "OMPI_MCA_ess_base_jobid")
    return _info(mpi, rank, size, local_rank, local_size, _open_mpi_host(mpi, environment, size > local_size), job)


def _open_mpi_host(mpi: Variables, environment: Mapping[str, str], several: bool) -> str:
    if not several or "MASTER_ADDR" in mpi:
        return LOOPBACK
    # In an allocation rank 0 is on its first host; without one it is on mpirun's own, which it was told.
    allocated = _allocated(environment)
    if allocated:
        return allocated
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    for contact in uri.split(";")[1:]:
        scheme, _, rest = contact.partition("://")
        if scheme == "tcp" and rest:
            return rest.partition(":")[0].split(",")[0]
    raise mpi.wrong(
        "nobody tells the host of rank 0: give it by `mpirun -x MASTER_ADDR=HOST`. The variable MASTER_ADDR is missing",
        "MASTER_ADDR",
    )


def _hydra(environment: Mapping[str, str]) -> ProcessInfo | None:
    mpi = Variables(environment, "MPICH", "start with mpiexec, or unset PMI_RANK")
    if mpi.number("PMI_SIZE", low=1) == 1:
        return None
    names = ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    if "PMI_LOCAL_RANK" in mpi and names[0] not in mpi:
        names = ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
    rank, size, local_rank, local_size = mpi.place("PMI_RANK", "PMI_SIZE", *names)
    if "MASTER_PORT" in mpi and ("MASTER_ADDR" in mpi or size == local_size):
        return _info(mpi, rank, size, local_rank, local_size, LOOPBACK, "")
    several = size > local_size and "MASTER_ADDR" not in mpi
    host, job = _ask_manager(mpi.number("PMI_FD"), rank, several)
    return _info(mpi, rank, size, local_rank, local_size, host or LOOPBACK, job)


def _info(mpi: Variables, rank: int, size: int, local_rank: int, local_size: int, host: str, job: str) -> ProcessInfo:
    address, port, job_id = mpi.meet_at(host, f"mpi/{job}")
    return ProcessInfo(
        global_rank=rank,
        local_rank=local_rank,
        node_rank=rank // local_size,
        world_size=size,
        local_world_size=local_size,
        main_address=address,
        main_port=port,
        job_id=job_id,
        owner="mpirun",
        how_to_start=_HOW,
    )


def _allocated(environment: Mapping[str, str]) -> str | None:
    """Give the first host of the allocation of a scheduler in which ``mpirun`` was called."""
    if environment.get("SLURM_JOB_NODELIST"):
        found = first_host(environment["SLURM_JOB_NODELIST"])
        return None if found is None else found[0]
    if environment.get("PBS_NODEFILE"):
        try:
            return Path(environment["PBS_NODEFILE"]).read_text(encoding="utf-8").split()[0]
        except (OSError, IndexError, ValueError):
            return None
    return None


@cache
def _ask_manager(descriptor: int, rank: int, several: bool) -> tuple[str, str]:
    """Ask Hydra, in PMI's first wire protocol, for what names the job, and let rank 0 tell all where it is.

    MPI itself can be initialised after this as before: the manager counts neither questions nor beginnings.

    Returns:
        The host of rank 0 where there are several hosts, and the job's name.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise OSError("it is no socket")  # noqa: TRY301
        with closing(socket.socket(fileno=os.dup(descriptor))) as manager:
            _ask(manager, "init pmi_version=1 pmi_subversion=1")
            name = _ask(manager, "get_my_kvsname")["kvsname"]
            if not several:
                return "", name
            if rank == 0:
                _ask(manager, f"put kvsname={name} key=fabric-host value={_own_address()}")
            _ask(manager, "barrier_in")
            return _ask(manager, f"get kvsname={name} key=fabric-host")["value"], name
    except (OSError, ValueError, KeyError) as error:
        raise LaunchError(
            f"the process manager of MPICH can't be asked by the variable PMI_FD: {error}",
            where="environment",
            got=f"PMI_FD={descriptor}",
            instead="mpiexec -genv MASTER_ADDR HOST -genv MASTER_PORT PORT, with the host of rank 0",
        ) from error


def _ask(manager: socket.socket, command: str) -> dict[str, str]:
    manager.sendall(f"cmd={command}\n".encode())
    answer = b""
    while not answer.endswith(b"\n"):
        # A timeout of the socket would make it non-blocking for MPI too, which shares it.
        if not select.select([manager], [], [], _PATIENCE)[0]:
            raise ValueError(f"no answer to {command.partition(' ')[0]} within {_PATIENCE:.0f} s")
        part = manager.recv(1)  # not a byte of a later answer may be taken
        if not part or len(answer) > _NAMES:
            raise ValueError(f"it answered {command.partition(' ')[0]} by {answer!r}")
        answer += part
    fields = dict(field.partition("=")[::2] for field in answer.decode().split())
    if fields.get("rc", "0") != "0":
        raise ValueError(f"it answered {command.partition(' ')[0]} by {answer!r}")
    return fields


def _own_address() -> str:
    """Give an address of this host that others can reach."""
    name = socket.gethostname()
    try:
        addresses = [entry[4][0] for entry in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)]
    except OSError:
        return name
    return next((str(one) for one in addresses if not str(one).startswith("127.")), name)
