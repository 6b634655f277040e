"""The launcher ``ray``: the ranks are Ray's actors, on one machine or on a cluster."""

import builtins
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from fabric_core.contracts import Launcher, LauncherCapabilities, LaunchOrder, PluginOptions, ProcessInfo
from fabric_core.errors import LaunchError, RankFailedError

_PLACE: Final = "RAY_FABRIC_PLACE"
"""The variable in which a rank finds its place, as JSON."""

_FOLDER = str(Path.cwd())
"""Where the command was typed, which a script may leave later."""


class RayOptions(PluginOptions):
    """The options of the launcher ``ray``."""

    address: str | None = None
    """The cluster to join; ``None`` is the one that ``RAY_ADDRESS`` names, or a new one on this machine."""
    cpus_per_rank: float = Field(default=1.0, ge=0)
    """How many cores Ray reserves for each rank."""
    gpus_per_rank: float = Field(default=0.0, ge=0)
    """How many GPUs Ray reserves for each rank, and shows to it."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How ranks are put on nodes, where ``num_nodes`` is 1; with more, each node's ranks stay together."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Ray's own: what every rank needs."""
    start_timeout: float = 300.0
    """How many seconds the cluster has to find room."""


class RayLauncher(Launcher):
    """Starts each rank as an actor, in a placement group of its own, and ends all when one fails."""

    Options = RayOptions
    options: RayOptions
    capabilities = LauncherCapabilities(multi_node=True)

    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        """Recognise an actor of this launcher.

        Raises:
            LaunchError: The variable is damaged.
        """
        if _PLACE not in environment:
            return None
        try:
            return ProcessInfo(**json.loads(environment[_PLACE]))
        except (TypeError, ValueError) as error:
            raise LaunchError(
                "the variable that names this rank's place can't be parsed",
                where=f"environment, {_PLACE}",
                got=environment[_PLACE],
                instead=f"unset {_PLACE}; fabric.launch() sets it",
            ) from error

    def setup_process(self, info: ProcessInfo) -> None:
        """End a rank that is a command of its own when its actor ends, which is killed where another rank failed."""
        if sys.platform == "linux" and not _in_an_actor():
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)

    def start(self, order: LaunchOrder) -> Any:
        """Start actors, run the function or the command in each, and give what rank 0 returned.

        Raises:
            RankFailedError: A rank failed; every rank has ended.
            LaunchError: The cluster has no room, or can't be reached; or there is no command to run again.
        """
        if order.function is None and (sys.orig_argv[1:2] in ([], ["-"]) or hasattr(sys, "ps1")):
            raise LaunchError(
                "no script was started, which could be run again",
                where="fabric.launch()",
                instead="fabric.launch(function)",
            )
        with _as_it_was(), ExitStack() as stack:
            import ray

            if not ray.is_initialized():
                address = self.options.address or os.environ.get("RAY_ADDRESS")
                # A Ray of its own has room for the ranks: it counts cores, and ranks may share them.
                room = (
                    {}
                    if address
                    else {"num_cpus": max(1, int(order.processes * order.nodes * self.options.cpus_per_rank))}
                )
                try:
                    ray.init(
                        address=address, include_dashboard=None if address else False, logging_level="error", **room
                    )
                except (ConnectionError, RuntimeError, ValueError) as error:
                    raise LaunchError(
                        "Ray can't be reached or started",
                        where="fabric.launch()",
                        got=str(error),
                        instead="ray start --head, or the launcher's option address",
                    ) from error
                stack.callback(ray.shutdown)
            actors = self._actors(order, stack)
            if order.function is not None:
                return self._run(order, actors)
            try:
                self._run(order, actors)
            except RankFailedError as error:
                print(error, file=sys.stderr)
                raise SystemExit(error.fields["exit_code"]) from None
            raise SystemExit(0)

    def _actors(self, order: LaunchOrder, stack: ExitStack) -> list[Any]:
        """Reserve room, and make an actor for each rank, in the order of the ranks."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        own = self.options
        each = {name: amount for name, amount in (("CPU", own.cpus_per_rank), ("GPU", own.gpus_per_rank)) if amount}
        together = 1 if order.nodes == 1 else order.processes  # a bundle is never divided over nodes
        bundles = [{name: amount * together for name, amount in each.items()} or {"CPU": 0.001}]
        group = placement_group(
            bundles * (order.processes * order.nodes // together),
            strategy=own.placement if order.nodes == 1 else "STRICT_SPREAD",
        )
        stack.callback(remove_placement_group, group)
        if not group.wait(own.start_timeout):
            raise LaunchError(
                f"Ray found no room for {order.processes} ranks on {order.nodes} node(s) in {own.start_timeout:g} s",
                where="fabric.launch()",
                got=f"the cluster has {ray.cluster_resources()}, each rank needs {each}",
                instead="fewer devices, fewer cpus_per_rank, or a larger cluster",
            )
        rank_class = ray.remote(_Rank)
        actors = [
            rank_class.options(
                num_cpus=own.cpus_per_rank,
                num_gpus=own.gpus_per_rank,
                runtime_env=own.runtime_env or None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=rank // together
                ),
            ).remote()
            for rank in range(order.processes * order.nodes)
        ]
        for actor in actors:
            stack.callback(ray.kill, actor)
        return actors

    def _run(self, order: LaunchOrder, actors: Sequence[Any]) -> Any:
        import ray

        address, port = ray.get(actors[0].meeting_place.remote())
        command = None if order.function is not None else [sys.executable, *sys.orig_argv[1:]]
        tasks = []
        for rank, actor in enumerate(actors):
            place = ProcessInfo(
                global_rank=rank,
                local_rank=rank % order.processes,
                node_rank=rank // order.processes,
                world_size=len(actors),
                local_world_size=order.processes,
                main_address=address,
                main_port=port,
                owner="ray",
            )
            tasks.append(actor.run.remote(json.dumps(asdict(place)), order.function, order.args, command, _FOLDER))
        waiting = list(tasks)
        while waiting:
            done, waiting = ray.wait(waiting)
            for one in done:
                self._look(tasks.index(one), one, command=command is not None)
        return ray.get(tasks[0])

    def _look(self, rank: int, task: Any, *, command: bool) -> None:
        """Raise where a rank failed.

        Raises:
            RankFailedError: It did.
        """
        import ray

        try:
            result = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise RankFailedError(
                f"rank {rank} failed first, with {type(error.cause).__name__}: {error.cause}; the others were ended",
                where=f"rank {rank}, a Ray actor",
                rank=rank,
                exit_code=1,
                trace=str(error),
            ) from error.cause
        except ray.exceptions.RayActorError as error:
            raise RankFailedError(
                f"rank {rank} was lost: {str(error).strip()}; the other ranks were ended",
                where=f"rank {rank}, a Ray actor",
                rank=rank,
                exit_code=1,
                trace=str(error),
            ) from error
        code = result if command else 0
        if code:
            raise RankFailedError(
                f"rank {rank} failed first, with exit code {code}; the other ranks were ended",
                where=f"rank {rank}, a Ray actor",
                rank=rank,
                exit_code=128 - code if code < 0 else code,
            )


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Undo what Ray changes in the process that starts it, which goes on after the ranks have ended."""
    variables, path, hook, printing = dict(os.environ), sys.path[:], sys.excepthook, builtins.print
    main = threading.current_thread() is threading.main_thread()
    handlers = {one: signal.getsignal(one) for one in signal.valid_signals()} if main else {}
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for one, handler in handlers.items():
                if handler is not None and signal.getsignal(one) is not handler:
                    signal.signal(one, handler)
            os.environ.clear()
            os.environ.update(variables)
            sys.path[:], sys.excepthook, builtins.print = path, hook, printing


def _in_an_actor() -> bool:
    """Say whether this process is an actor itself; then it runs a function."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


class _Rank:
    """A rank; Ray makes a process of it."""

    def meeting_place(self) -> tuple[str, int]:
        """Give this node's address, and a free port of it."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.create_server(("", 0)) as listener:
            return address, listener.getsockname()[1]

    def run(
        self,
        place: str,
        function: Callable[..., Any] | None,
        args: Sequence[Any],
        command: Sequence[str] | None,
        folder: str,
    ) -> Any:
        """Run the function here, or the command in a process of its own; give the result, or the exit code."""
        os.environ[_PLACE] = place
        if function is not None:
            result = function(*args)
            return result if json.loads(place)["global_rank"] == 0 else None
        here = folder if Path(folder).is_dir() else None  # another node may have put the script elsewhere
        return subprocess.run(command or [], check=False, cwd=here).returncode
