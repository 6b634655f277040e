"""Launchers: how processes start."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_plugins.launchers.elastic import ElasticLauncher
    from fabric_plugins.launchers.environment import EnvironmentLauncher
    from fabric_plugins.launchers.lsf import LSFLauncher
    from fabric_plugins.launchers.mpi import MPILauncher
    from fabric_plugins.launchers.slurm import SlurmLauncher

__all__ = ["ElasticLauncher", "EnvironmentLauncher", "LSFLauncher", "MPILauncher", "SlurmLauncher"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "ElasticLauncher": "elastic",
        "EnvironmentLauncher": "environment",
        "LSFLauncher": "lsf",
        "MPILauncher": "mpi",
        "SlurmLauncher": "slurm",
    },
)
