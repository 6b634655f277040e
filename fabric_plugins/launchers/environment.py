"""Processes that were started with ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, each of which joins.

So do Kubeflow's PyTorchJob, DeepSpeed's and Azure's launchers, and users in tutorials.
"""

from collections.abc import Mapping
from typing import Any, Final

from fabric_core.contracts import LauncherCapabilities, LaunchOrder, ProcessInfo
from fabric_core.errors import LaunchError
from fabric_plugins.launchers._ranks import JoinedLauncher
from fabric_plugins.launchers._variables import Variables

__all__ = ["EnvironmentLauncher"]

_FOREIGN: Final[Mapping[str, tuple[str, ...]]] = {
    # what numbers a process: what counts them
    "OMPI_COMM_WORLD_RANK": ("OMPI_COMM_WORLD_SIZE",),
    "PMI_RANK": ("PMI_SIZE",),
    "JSM_NAMESPACE_RANK": ("JSM_NAMESPACE_SIZE",),
    "MV2_COMM_WORLD_RANK": ("MV2_COMM_WORLD_SIZE",),
    "FLUX_TASK_RANK": ("FLUX_JOB_SIZE",),
    "PALS_RANKID": ("PALS_SIZE", "PMI_SIZE"),
    "ALPS_APP_PE": ("PMI_SIZE",),
    "HOROVOD_RANK": ("HOROVOD_SIZE",),
    "PMIX_RANK": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "JSM_NAMESPACE_SIZE", "FLUX_JOB_SIZE"),
}
_WAYS: Final = (
    "torchrun, srun, mpirun or fabric-core run; or RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and"
    " MASTER_PORT in each process; or unset {name} where there is one process"
)


class EnvironmentLauncher(JoinedLauncher):
    """Recognises processes by ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``; asked last.

    ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` say how many of them are on one node; without them all are on one where
    ``MASTER_ADDR`` is this machine by any of its loopback names, and each has a node of its own where it isn't, as in
    Kubeflow. What numbers a process in the variables of a system that no launcher here recognises is an error: such
    processes would each train alone.
    """

    capabilities = LauncherCapabilities(multi_node=True)

    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        """Recognise a job of several processes."""
        plain = Variables(
            environment,
            "whatever started this process",
            "all of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or none of RANK and WORLD_SIZE",
        )
        if "RANK" not in plain and environment.get("WORLD_SIZE", "1").strip() in {"", "1"}:
            _check_foreign(environment)
            return None
        size = plain.number("WORLD_SIZE", low=1)
        rank = plain.number("RANK", below=size)
        if size == 1:
            return None
        address = plain.host("MASTER_ADDR")
        port = plain.number("MASTER_PORT", low=1, below=65_536)
        local_rank, local_size = _local(plain, environment, rank, size, address)
        node = "GROUP_RANK" if "GROUP_RANK" in plain else "NODE_RANK"
        return ProcessInfo(
            global_rank=rank,
            local_rank=local_rank,
            node_rank=plain.number(node, below=size // local_size) if node in plain else rank // local_size,
            world_size=size,
            local_world_size=local_size,
            main_address=address,
            main_port=port,
            owner="RANK and WORLD_SIZE",
            how_to_start="{nodes} x {devices} processes, each with LOCAL_RANK and LOCAL_WORLD_SIZE={devices}",
        )

    def start(self, order: LaunchOrder) -> Any:
        """Refuse: whoever sets the variables starts the processes."""
        raise LaunchError(
            "this launcher starts nothing: it recognises processes by their variables",
            where="fabric.launch()",
            instead=_WAYS.format(name="RANK"),
        )


def _local(plain: Variables, environment: Mapping[str, str], rank: int, size: int, address: str) -> tuple[int, int]:
    """Give the rank on this node, and how many there are."""
    name = next((one for one in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if one in plain), None)
    if name is not None:
        _, _, local_rank, local_size = plain.place("RANK", "WORLD_SIZE", "LOCAL_RANK", name)
        return local_rank, local_size
    one_machine = address in {"localhost", "::1"} or address.startswith("127.")
    local_rank, local_size = (rank, size) if one_machine else (0, 1)
    if environment.get("LOCAL_RANK") and plain.number("LOCAL_RANK") != local_rank:
        raise plain.wrong("LOCAL_RANK needs the variable LOCAL_WORLD_SIZE beside it, which is missing", "LOCAL_RANK")
    return local_rank, local_size


def _check_foreign(environment: Mapping[str, str]) -> None:
    """Refuse variables that number this process among others, and that nobody recognised."""
    for name, sizes in _FOREIGN.items():
        if not environment.get(name):
            continue
        counts = [environment[size].strip() for size in sizes if environment.get(size)]
        if "1" in counts:
            continue
        raise LaunchError(
            f"the variable {name} says that this process is one of several, and no launcher recognises its system",
            where="environment",
            got=", ".join(f"{one}={environment[one]}" for one in (name, *sizes) if environment.get(one)),
            instead=_WAYS.format(name=name),
        )
