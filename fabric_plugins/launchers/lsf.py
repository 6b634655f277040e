"""Processes by LSF's ``jsrun``, each of which joins."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fabric_core.contracts import LauncherCapabilities, LaunchOrder, ProcessInfo
from fabric_core.errors import LaunchError
from fabric_plugins.launchers._ranks import JoinedLauncher
from fabric_plugins.launchers._variables import LOOPBACK, Variables

__all__ = ["LSFLauncher"]

_HOW: Final = "jsrun with {nodes} x {devices} tasks, {devices} on each node"


class LSFLauncher(JoinedLauncher):
    """Recognises the tasks that ``jsrun`` starts in an LSF job.

    Recognised by the environment that the documentation of LSF and JSM describes, and never tried on LSF itself.
    """

    capabilities = LauncherCapabilities(multi_node=True)

    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        """Recognise a job step of several tasks."""
        if not environment.get("LSB_JOBID") or not environment.get("JSM_NAMESPACE_RANK"):
            return None
        lsf = Variables(environment, "LSF", "start with jsrun, or unset JSM_NAMESPACE_RANK")
        if lsf.number("JSM_NAMESPACE_SIZE", low=1) == 1:
            return None
        rank, size, local_rank, local_size = lsf.place(
            "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"
        )
        several = size > local_size and "MASTER_ADDR" not in lsf
        step = environment.get("PMIX_NAMESPACE", "")
        address, port, job_id = lsf.meet_at(
            _compute_host(lsf, environment) if several else LOOPBACK, f"lsf/{lsf.text('LSB_JOBID')}/{step}"
        )
        return ProcessInfo(
            global_rank=rank,
            local_rank=local_rank,
            node_rank=rank // local_size,
            world_size=size,
            local_world_size=local_size,
            main_address=address,
            main_port=port,
            job_id=job_id,
            owner="jsrun",
            how_to_start=_HOW,
        )

    def start(self, order: LaunchOrder) -> Any:
        """Refuse: ``jsrun`` starts the processes."""
        raise LaunchError(
            "this launcher starts nothing: LSF does",
            where="fabric.launch()",
            instead=_HOW.format(nodes=order.nodes, devices=order.processes),
        )


def _compute_host(lsf: Variables, environment: Mapping[str, str]) -> str:
    """Give the first host that computes: the list of all begins with the one on which the job's script runs."""
    if environment.get("LSB_DJOB_RANKFILE"):
        try:
            hosts = Path(environment["LSB_DJOB_RANKFILE"]).read_text(encoding="utf-8").split()
        except (OSError, ValueError) as error:
            raise lsf.wrong(
                f"the file of the variable LSB_DJOB_RANKFILE can't be read: {error}", "LSB_DJOB_RANKFILE"
            ) from error
        name = "LSB_DJOB_RANKFILE"
    elif environment.get("LSB_MCPU_HOSTS"):
        hosts, name = environment["LSB_MCPU_HOSTS"].split()[::2], "LSB_MCPU_HOSTS"
    else:
        hosts, name = lsf.text("LSB_HOSTS").split(), "LSB_HOSTS"
    several = list(dict.fromkeys(hosts))
    if not several:
        raise lsf.wrong(f"the variable {name} has no host", name)
    return several[1] if len(several) > 1 else several[0]
