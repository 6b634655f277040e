"""``fabric-core doctor``: forms the world as a script would, and says what is broken; ends in time whatever is."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fabric_core.assembly import Assembly, assemble
from fabric_core.choosing.request import Request
from fabric_core.cli._asking import request_of
from fabric_core.cli._facts import find_facts
from fabric_core.cli._meeting import Job, examine_node, meet_others
from fabric_core.cli._output import AsJson, Exit, handing_on
from fabric_core.collectives import ProcessInfo
from fabric_core.contracts import LaunchOrder
from fabric_core.errors import FabricError
from fabric_core.running.launching import detect, starter

__all__ = ["doctor"]


def doctor(
    within: Annotated[float, typer.Option(help="End after so many seconds, whatever is broken.", min=20)] = 50.0,
    max_latency: Annotated[float, typer.Option(help="A link is slow above so many milliseconds.", min=0)] = 5.0,
    min_bandwidth: Annotated[float, typer.Option(help="A link is slow below so many MB/s.", min=0)] = 50.0,
    as_json: AsJson = False,
    **asked: Any,
) -> None:
    """Form the world as a script would, and say what is broken; under torchrun, srun and mpirun too."""
    began = time.monotonic() - _age()
    request, variables = request_of(**asked)
    assembly, error = _assemble(request, variables)
    found = detect(assembly.chosen.ranked("launcher"))
    if found is not None and found[2].world_size > 1 and request.devices == "auto" and request.num_nodes == 1:
        info = found[2]
        request = request.with_devices(info.local_world_size, info.world_size // info.local_world_size)
        assembly.bindings.undo()
        assembly, error = _assemble(request, variables)
    plan = assembly.chosen.plan
    if found is None and error is not None:
        raise error
    if found is None and plan.world_size > 1:
        launcher = starter(assembly.chosen.ranked("launcher"), plan.num_nodes)
        with handing_on():
            launcher.start(LaunchOrder(processes=len(plan.device_indices), nodes=plan.num_nodes))
        return
    info = ProcessInfo() if found is None else found[2]
    job = Job(info, began + within, as_json, (max_latency, min_bandwidth), assembly)
    facts = find_facts(info, job.registry, None if error else plan, None if error is None else str(error))
    job.ranks[info.global_rank] = facts
    if info.world_size > 1 and found is not None:
        sound = meet_others(job, found[1])
    else:
        job.plugins = examine_node(job)
        sound = job.say()
    if not sound:
        raise typer.Exit(Exit.NO)


def _assemble(request: Request, variables: Mapping[str, str]) -> tuple[Assembly, FabricError | None]:
    """Choose what was asked for; where that can't be done, what would be chosen for nothing, and why."""
    try:
        return assemble(request, variables, lambda: None), None
    except FabricError as error:
        return assemble(Request.of(lock=request.lock), variables, lambda: None), error


def _age() -> float:
    """Give for how many seconds this process has run: importing PyTorch is part of what the user waits for."""
    try:
        ticks = int(Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[19])
    except OSError:
        return 0.0  # no Linux
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
