"""Processes by SLURM: ``srun`` starts them, each joins."""

import re
from collections.abc import Mapping
from typing import Any, Final

from fabric_core.contracts import LauncherCapabilities, LaunchOrder, ProcessInfo
from fabric_core.errors import LaunchError
from fabric_plugins.launchers._ranks import JoinedLauncher
from fabric_plugins.launchers._variables import LOOPBACK, Variables, first_host

__all__ = ["SlurmLauncher"]

_INSTEAD: Final = "start with srun, or unset SLURM_STEP_ID"
_NOT_STEPS: Final = frozenset(str(number) for number in range(2**32 - 6, 2**32))
"""The numbers that SLURM gives to batch scripts, interactive shells and what else is no step of tasks."""
_HOW: Final = "srun --nodes {nodes} --ntasks-per-node {devices} python script.py"


class SlurmLauncher(JoinedLauncher):
    """Recognises the tasks of a SLURM step, which ``srun`` starts.

    The shell of an allocation (``salloc``) and a batch script without ``srun`` are no tasks, and a step of one task is
    like a shell: from there processes are started as on any machine.
    """

    capabilities = LauncherCapabilities(multi_node=True)

    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        """Recognise a step of several tasks."""
        slurm = Variables(environment, "SLURM", _INSTEAD)
        step = environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID")
        if not step or step in _NOT_STEPS:
            return None
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in slurm else "SLURM_NTASKS"
        if slurm.number(size, low=1) == 1:
            return None
        if "SLURM_HET_SIZE" in slurm and slurm.number("SLURM_HET_SIZE", low=1) > 1:
            raise slurm.wrong("a heterogeneous job has no ranks of one numbering: SLURM_HET_SIZE", "SLURM_HET_SIZE")
        nodes = slurm.number("SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in slurm else "SLURM_NNODES", low=1)
        world_size = slurm.number(size, low=1)
        local = self._tasks_per_node(slurm, nodes, world_size)
        job = f"slurm/{slurm.text('SLURM_JOB_ID' if 'SLURM_JOB_ID' in slurm else 'SLURM_JOBID')}/{step}"
        address, port, job_id = slurm.meet_at(_main_host(slurm, environment, nodes), job)
        return ProcessInfo(
            global_rank=slurm.number("SLURM_PROCID", below=world_size),
            local_rank=slurm.number("SLURM_LOCALID", below=local),
            node_rank=slurm.number("SLURM_NODEID", below=nodes),
            world_size=world_size,
            local_world_size=local,
            main_address=address,
            main_port=port,
            job_id=job_id,
            attempt=slurm.number("SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in slurm else 0,
            owner="srun",
            how_to_start=_HOW + _beside(slurm, nodes, world_size),
        )

    def start(self, order: LaunchOrder) -> Any:
        """Refuse: ``srun`` starts the processes."""
        raise LaunchError(
            "this launcher starts nothing: SLURM does",
            where="fabric.launch()",
            instead=_HOW.format(nodes=order.nodes, devices=order.processes),
        )

    def _tasks_per_node(self, slurm: Variables, nodes: int, tasks: int) -> int:
        """Give the number of tasks on each node, which must be the same everywhere."""
        name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in slurm else "SLURM_TASKS_PER_NODE"
        parts = [re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part) for part in slurm.text(name).split(",")]
        counts = [(int(part[1]), int(part[2] or 1)) for part in parts if part is not None]
        if len(counts) < len(parts) or sum(times for _, times in counts) != nodes:
            raise slurm.wrong(f"the variable {name} doesn't tell how many tasks each of {nodes} nodes has", name)
        if sum(count * times for count, times in counts) != tasks:
            raise slurm.wrong(f"the variable {name} contradicts the number of tasks, {tasks}", name)
        if len({count for count, _ in counts}) > 1:
            asked = (
                f"--ntasks={tasks} beside --ntasks-per-node={slurm.number('SLURM_NTASKS_PER_NODE', low=1)}"
                if "SLURM_NTASKS_PER_NODE" in slurm
                else f"--ntasks={tasks} on {nodes} nodes"
            )
            raise LaunchError(
                f"SLURM divided {asked} unevenly, and every node needs as many tasks as it has devices",
                where="environment",
                got=f"{name}={slurm.text(name)}",
                instead=_HOW.format(nodes=nodes, devices=-(-tasks // nodes)) + ", without --ntasks",
            )
        return counts[0][0]


def _beside(slurm: Variables, nodes: int, tasks: int) -> str:
    """Say which of two options won, where both were given and say different numbers."""
    if "SLURM_NTASKS_PER_NODE" not in slurm or slurm.number("SLURM_NTASKS_PER_NODE", low=1) * nodes == tasks:
        return ""
    return f", without --ntasks ({tasks} here), which wins over --ntasks-per-node"


def _main_host(slurm: Variables, environment: Mapping[str, str], nodes: int) -> str:
    """Give the host of task 0: the first one, unless the tasks were laid out by a file."""
    name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in slurm else "SLURM_JOB_NODELIST"
    found = first_host(slurm.text(name))
    if found is None:
        raise slurm.wrong(f"the variable {name} is no list of hosts", name)
    if found[1] < nodes:
        raise slurm.wrong(f"the variable {name} has {found[1]} hosts, and the step {nodes}", name)
    if nodes == 1:
        return LOOPBACK
    if environment.get("SLURM_DISTRIBUTION", "").startswith("arbitrary") and "MASTER_ADDR" not in slurm:
        raise slurm.wrong(
            "with an arbitrary distribution nobody knows the host of task 0; set MASTER_ADDR. The variable "
            "SLURM_DISTRIBUTION",
            "SLURM_DISTRIBUTION",
        )
    return found[0]
