"""``fabric-core run``: the processes of one node of a job, by ``torch.distributed.run``."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fabric_core.assembly import make_plan
from fabric_core.choosing.parsing import MOST_NODES, brief
from fabric_core.choosing.request import Request, read_file, read_outside
from fabric_core.cli._asking import Config
from fabric_core.cli._output import AsJson, Exit, handing_on, print_json, print_text
from fabric_core.errors import RequestError

__all__ = ["run"]

_SCRIPT = Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGUMENTS]...", help="The script and its arguments.")]


def run(
    script: _SCRIPT,
    nnodes: Annotated[str, typer.Option(help="How many nodes: a number, or MIN:MAX.")] = "1",
    node_rank: Annotated[int, typer.Option(help="This node among all, from 0.", min=0)] = 0,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="HOST:PORT at which the nodes meet: the first node's.")
    ] = None,
    max_restarts: Annotated[int, typer.Option(help="How often a failed job is started again.", min=0)] = 0,
    accelerator: Annotated[
        str | None, typer.Option(help="What `Fabric()` is given where the script leaves it at its default.")
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    devices: Annotated[str | None, typer.Option(help="Likewise; as many processes are started on this node.")] = None,
    num_nodes: Annotated[int | None, typer.Option(help="The same as --nnodes.", min=1)] = None,
    precision: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    config: Config = None,
    module: Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print what each node would start, and start nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start the processes of this node, which join the others in `Fabric()`; the same command on every node."""
    if config is not None and num_nodes is None and nnodes == "1":
        num_nodes = read_file(config).get("num_nodes")
    nodes = nnodes if num_nodes is None else str(num_nodes)
    if num_nodes is not None and nnodes not in {"1", str(num_nodes)}:
        raise RequestError(
            "--nnodes and --num-nodes say different numbers", got=f"{nnodes}, {num_nodes}", instead="one of them"
        )
    most = nodes.partition(":")[2] or nodes
    if not most.isdecimal() or len(most) > len(str(MOST_NODES)) or not 1 <= int(most) <= MOST_NODES:
        raise RequestError(
            "--nnodes is no number of nodes",
            got=brief(nodes),
            instead=f"--nnodes 2, or --nnodes 1:4; at most {MOST_NODES:,}",
        )
    if int(most) > 1 and rdzv_endpoint is None:
        raise RequestError(
            "several nodes need a place where they meet",
            instead="--rdzv-endpoint HOST:PORT, the first node's",
        )
    variables = {
        f"FABRIC_{name}": value
        for name, value in {
            "ACCELERATOR": accelerator,
            "STRATEGY": strategy,
            "DEVICES": devices,
            "NUM_NODES": most if int(most) > 1 else None,
            "PRECISION": precision,
            "CONFIG": None if config is None else str(config.absolute()),
        }.items()
        if value is not None
    }
    target = ["-m", *script] if module else script
    environment = {**os.environ, **variables}
    # As many processes as the script's `Fabric()` will want, where it leaves this at its default.
    asked = Request.of(**read_outside(environment))
    count = str(len(make_plan(asked, environment).device_indices))
    if dry_run:
        said = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        every = [_words(nodes, node, count, rdzv_endpoint, max_restarts, target) for node in range(int(most))]
        if as_json:
            print_json([{"node": node, "variables": variables, "command": ["torchrun", *words]}
                        for node, words in enumerate(every)])  # fmt: skip
            return
        for node, words in enumerate(every):
            typer.echo(f"node {node}: {said + ' ' if said else ''}{shlex.join(['torchrun', *words])}")
        return
    os.environ.update(variables)
    words = _words(nodes, node_rank, count, rdzv_endpoint, max_restarts, target)
    with handing_on():
        _run_agent(words)


def _run_agent(words: list[str]) -> None:
    """Be torchrun, in this process: another one would import PyTorch a second time.

    Raises:
        typer.Exit: A rank failed, with 1; or a signal came, with 128 and its number.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(words)
    except ChildFailedError as failed:
        print_text(str(failed), error=True)
        raise typer.Exit(Exit.NO) from None
    except SignalException as signalled:
        raise typer.Exit(128 + signalled.sigval) from None


def _words(nodes: str, node: int, count: str, endpoint: str | None, restarts: int, target: Sequence[str]) -> list[str]:
    words = ["--nnodes", nodes, "--nproc-per-node", count, "--max-restarts", str(restarts)]
    if endpoint is None:
        words += ["--standalone"]
    else:
        host, _, port = endpoint.rpartition(":")
        # Fixed nodes meet without a rendezvous of their own, which would have to know which host is which.
        fixed = ":" not in nodes
        words += (
            ["--node-rank", str(node), "--master-addr", host, "--master-port", port]
            if fixed
            else ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
        )
    if target[0] != "-m" and not Path(target[0]).exists():
        raise RequestError("there is no such script", got=target[0], instead="the path of a script, or -m and a module")
    return [*words, *target]
