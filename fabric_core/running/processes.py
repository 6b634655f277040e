"""A Fabric's processes: who this one is, how they start and end, and what they say to each other."""

import atexit
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Final, Self
from weakref import finalize, ref

import torch

from fabric_core._torch import tree_map_only
from fabric_core.choosing.plan import Plan
from fabric_core.choosing.request import Request
from fabric_core.choosing.resolve import start_clash
from fabric_core.collectives import Collectives, ProcessInfo, World
from fabric_core.contracts import Accelerator, Launcher, LaunchOrder, Logger, Precision, Strategy, map_tensors
from fabric_core.errors import LaunchError, LaunchTypeError, MisuseError
from fabric_core.running import reporting
from fabric_core.running.failing import Failures
from fabric_core.running.launching import (
    agree,
    check_connected,
    check_launched,
    check_nodes,
    detect,
    has_joined,
    make_world,
    starter,
)
from fabric_core.running.seeding import last_seed, seed_everything
from fabric_core.running.stopping import Stopping

__all__ = ["Processes"]

_TIMEOUT: Final = timedelta(minutes=30)


class Processes:
    """The part of ``Fabric`` that has to do with processes; the rest of it makes what is declared here."""

    _plan: Plan
    _request: Request
    _accelerator: Accelerator
    _strategy: Strategy
    _precision: Precision
    _loggers: list[Logger]
    _launchers: Any
    _bindings: Any
    _hooks: Any
    _setup: Any
    _checkpointing: Any
    _world: World | None
    _collectives: Collectives
    _launcher: Launcher | None
    _failures: Failures | None
    _stopping: Stopping | None
    _closing: Any
    _at_exit: Any

    # Who this process is

    @property
    def world(self) -> World:
        """Who this process is; no ``launch`` is needed for a single process, nor where something started this one.

        Raises:
            MisuseError: There will be several processes, and they are not launched yet.
        """
        if self._world is None:
            if self._plan.world_size > 1 and detect(self._launchers) is None:
                raise MisuseError(
                    f"the {self._plan.world_size} processes are not launched yet",
                    where="this call needs them",
                    instead="call fabric.launch() right after Fabric(...)",
                )
            self.launch()
        if self._world is None:
            raise AssertionError("launching made no world")
        return self._world

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.world.device

    @property
    def global_rank(self) -> int:
        """This process among all, from 0."""
        return self.world.global_rank

    @property
    def local_rank(self) -> int:
        """This process among those of its node, from 0."""
        return self.world.local_rank

    @property
    def node_rank(self) -> int:
        """This node among all, from 0."""
        return self.world.node_rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self._plan.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.world.is_global_zero

    # Starting

    def launch(self, function: Callable[..., Any] | None = None, /, *args: Any, **kwargs: Any) -> Any:
        """Start the processes that the plan has, or join those that something else started.

        Without a function, each rank re-runs the command that was typed and comes back from here as itself; the process
        that the user started waits and exits with their exit code. With one device no process is started.

        Args:
            function: What to run in each rank instead; it is given this object of that rank, then the rest.
            args: The function's further positional arguments.
            kwargs: The function's keyword arguments.

        Returns:
            What the function returned on rank 0; without a function ``None``.

        Raises:
            LaunchError: The processes could not be started, or don't agree on the plan.
            LaunchTypeError: What was given is no function that takes a ``Fabric``; or nothing was, and the strategy
                starts processes that run a function.
            RankFailedError: The function failed on a rank.
        """
        check_launched(function)
        if self._world is None:
            found = None if self._is_alone() else detect(self._launchers)
            if found is not None and (found[2].world_size > 1 or self._plan.world_size > 1):
                check_nodes(*found)
                self._join(found[1], found[2])
            elif self._plan.world_size > 1:
                return self._start(function, args, kwargs)
            else:
                self._join(None, ProcessInfo())
        return None if function is None else function(self, *args, **kwargs)

    def _start(self, function: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        launcher = starter(self._launchers, self._plan.num_nodes)
        clash = start_clash(self._strategy, self._accelerator)
        if clash is not None:
            raise LaunchError(
                f"the strategy can't start processes: {clash}",
                where="fabric.launch()",
                instead="launch before anything uses a device, or another way of starting",
            )
        if function is None and self._strategy.start_method is not None:
            raise LaunchTypeError(
                f"{self._strategy!r} starts processes that run a function",
                where="fabric.launch()",
                instead="fabric.launch(function), or a strategy without a start method, under which each process "
                "runs the whole script",
            )
        return launcher.start(
            LaunchOrder(
                processes=len(self._plan.device_indices),
                nodes=self._plan.num_nodes,
                start_method=self._strategy.start_method,
                function=None if function is None else _launched,
                args=() if function is None else (self, function, args, kwargs, last_seed()),
            )
        )

    def _is_alone(self) -> bool:
        """Say whether this is a process of its own wherever it runs.

        That is a program's own business once it has joined the others, as with an evaluator or a player; before that it
        needs a strategy that was asked for and knows no other processes: each of several would train alone.
        """
        if self._plan.world_size > 1:
            return False
        named = not self._request.strategy.is_auto and not self._strategy.capabilities.distributed
        return named or has_joined()

    def _rank(self) -> int | None:
        return None if self._world is None else self._world.global_rank

    def _join(self, launcher: Launcher | None, ranks: ProcessInfo) -> None:
        world = make_world(ranks, self._plan, self._accelerator, self._strategy, _TIMEOUT)
        self._bindings.renew()
        if launcher is not None:
            self._launcher = launcher
            launcher.setup_process(ranks)
            if world.world_size > 1:
                self._failures = Failures(world, launcher)  # and they stay on failure: the first one is shown
                agree(world, self._plan, launcher, self._failures)
        hook = sys.excepthook
        with ExitStack() as undo:
            undo.callback(self._accelerator.teardown)
            self._accelerator.setup_device(world.device)
            undo.enter_context(world.closing)
            undo.callback(self._strategy.teardown)
            own = self._strategy.connect(world, self._precision.policy)
            check_connected(own, world, self._strategy)
            shared = own.fork() if world.world_size > 1 else own
            self._bindings.bind(shared)
            self._collectives = self._strategy.collectives = shared
            self._precision.connect(self._collectives)
            undo.pop_all()
        sys.excepthook = hook  # torch's process group puts one round it, each time, for good
        self._world = world
        if self._failures is not None:
            self._failures.watch_exit()
        for logger in self._loggers:
            logger.connect(self._collectives)
        if self._loggers and world.is_global_zero:
            # At the end of the script, or of this object's life, where nothing else does it.
            self._closing = finalize(self, reporting.finalize, self._loggers)
        if self._hooks.failed.get_hookimpls() or self._hooks.torn_down.get_hookimpls():
            self._at_exit = partial(_ended, ref(self))
            atexit.register(self._at_exit)
            finalize(self, atexit.unregister, self._at_exit).atexit = False
        self._hooks.launched(fabric=self, world=world)

    # Between ranks

    def _connected(self) -> Collectives:
        self.world  # noqa: B018 - connects a single process
        return self._collectives

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on one process of each node."""
        if self.local_rank == 0:
            print(*args, **kwargs)  # noqa: T201 - what it is for

    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank is here."""
        self._connected().barrier(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give every rank the object of one."""
        return self._connected().broadcast(obj, src)

    def all_reduce(self, data: Any, group: Any | None = None, reduce_op: str | None = "mean") -> Any:
        """Reduce every tensor of a nested value over the ranks; numbers become tensors."""
        collectives = self._connected()
        reduce_op = reduce_op or "sum"
        result = map_tensors(_tensors(data, self.device), lambda one: collectives.all_reduce(one, group, reduce_op))
        if group is None:
            self._setup.reduced(result)
        return result

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Gather every tensor of a nested value over the ranks.

        Returns:
            The same nesting, each tensor of shape ``(world size, *shape)``; a list where shapes differ. With one
            process the shapes are those that were given, as Lightning Fabric's.
        """
        collectives = self._connected()

        def gather(one: torch.Tensor) -> Any:
            parts = collectives.all_gather(one, group, sync_grads)
            if self.world_size == 1:
                return parts[0]
            return torch.stack(parts) if len({part.shape for part in parts}) == 1 else parts

        return map_tensors(_tensors(data, self.device), gather)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Let rank 0 run the block before all others.

        They wait as long as for any collective: where rank 0 takes more than the usual 30 minutes, raise the strategy's
        ``timeout``, as in ``Fabric(strategy="NAME:timeout=PT3H")``.

        Args:
            local: Each node's local rank 0, instead of the one global rank 0.

        Raises:
            LaunchError: On the other ranks, when rank 0 raised; they do not run the block.
        """
        world = self.world
        first = range(0, world.world_size, world.local_world_size) if local else range(1)
        if world.global_rank in first:
            try:
                yield
            except BaseException as error:
                self._tell(first, f"{type(error).__name__}: {error}")
                raise
            self._tell(first, None)
            return
        failures = self._tell(first, None)
        if failures:
            raise LaunchError(
                "; ".join(f"rank {rank} failed: {text}" for rank, text in failures.items()),
                where="fabric.rank_zero_first",
            )
        yield

    def _tell(self, ranks: range, text: str | None) -> dict[int, str]:
        """Send a text from each of some ranks to all; gives what they sent, where it is one."""
        return {rank: one for rank in ranks if (one := self._collectives.broadcast(text, rank)) is not None}

    @property
    def should_stop(self) -> bool:
        """Whether this process, or one of any other rank, was told to end; every rank must ask, in the same place.

        The first time that it is asked, SIGTERM and SIGINT (Ctrl-C) no longer end the process, until ``teardown``. So a
        loop that asks in each round can save a last checkpoint and end; whatever started the ranks gives them some
        seconds for it. A second Ctrl-C, at least two seconds later, interrupts as usual. With several ranks each
        question costs a small all-reduce.

        Raises:
            MisuseError: It is asked for the first time outside the main thread.
        """
        collectives = self._connected()
        if self._stopping is None:
            self._stopping = Stopping()
            finalize(self, self._stopping.end).atexit = False
        return self._stopping.agreed(collectives, self.device)

    # The end

    def teardown(self) -> None:
        """Release all resources: process group, devices, loggers. May be called again."""
        world, launcher, failures = self._world, self._launcher, self._failures
        self._failures = None
        if failures is not None:
            failures.end(sys.exc_info()[1])
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self._at_exit = None
        with ExitStack() as stack:
            if self._stopping is not None:
                stack.callback(self._stopping.end)
                self._stopping = None
            stack.callback(self._bindings.undo)
            if launcher is not None:
                stack.callback(launcher.teardown)
            if world is not None:
                stack.callback(self._accelerator.teardown)
                stack.enter_context(world.closing)
                stack.callback(self._strategy.teardown)
                stack.callback(self._setup.close)
            try:
                if self._closing is not None:
                    self._closing()  # first, because a logger may ask who this process is
            finally:
                try:
                    self._checkpointing.close()
                finally:
                    self._world = self._launcher = None
                    del self._strategy.collectives
        if world is not None:
            self._hooks.torn_down(fabric=self)

    def __enter__(self) -> Self:
        """Tear down at the end of a ``with`` block."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Tear down, and tell who listens where an exception leaves the block."""
        try:
            if error is not None:
                self._hooks.failed(fabric=self, error=error)
        finally:
            self.teardown()

    def tell_end(self, error: BaseException | None) -> None:
        """Tell who listens that the script ends, and whether an exception ends it."""
        if error is not None:
            self._hooks.failed(fabric=self, error=error)
        self._hooks.torn_down(fabric=self)


def _launched(
    fabric: Processes,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seed: int | None,
) -> Any:
    """Run a function in a rank that was started for it, seeded as the process that started it."""
    if seed is not None:
        seed_everything(seed, verbose=False)
    with fabric:
        return fabric.launch(function, *args, **kwargs)


def _ended(fabric: "ref[Processes]") -> None:
    """Tell, at the end of a script that doesn't tear down, who listens."""
    one = fabric()
    if one is not None:
        one.tell_end(None if hasattr(sys, "ps1") else getattr(sys, "last_value", None))


def _tensors(data: Any, device: torch.device) -> Any:
    """Turn the numbers of a nested value into tensors."""
    return tree_map_only((bool, int, float), lambda number: torch.as_tensor(number, device=device), data)
