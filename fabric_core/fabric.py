"""The façade: everything a training script calls, in the order of a script's life."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar
from weakref import finalize

from fabric_core.assembly import assemble
from fabric_core.choosing.plan import Plan
from fabric_core.choosing.registry import register, registrations
from fabric_core.choosing.request import Request, fill, read_outside
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import (
    Accelerator,
    Launcher,
    Logger,
    Precision,
    Strategy,
    World,
    Wrapper,
)
from fabric_core.errors import MisuseError, NoLoggerError
from fabric_core.kinds import KINDS, Count
from fabric_core.running import reporting, seeding
from fabric_core.running.asynchronous import SaveHandle
from fabric_core.running.checkpointing import Checkpointing, numbered
from fabric_core.running.failing import Failures
from fabric_core.running.launching import environment
from fabric_core.running.processes import Processes
from fabric_core.running.seeding import RandomState
from fabric_core.running.stopping import Stopping
from fabric_core.utilities import track
from fabric_core.wrapping import (
    Acts,
    FabricDataLoader,
    Setup,
    Training,
    unwrap,
)

__all__ = ["Fabric"]

T = TypeVar("T")

_TIMEOUT: Final = timedelta(minutes=30)


class Fabric(Processes, Training):
    """Runs a plain PyTorch script on any hardware, with any strategy, in any precision.

    Args:
        accelerator: The hardware, by name; ``"auto"`` takes the best that is here.
        strategy: How processes train together, by name; ``"auto"`` takes what fits the number of devices.
        devices: A count, indices, or ``"auto"``; for each node.
        num_nodes: The number of machines.
        precision: The number types, by name.
        wrappers: What else transforms models, in order.
        plugins: Extensions, and plugins of the kinds ``precision``, ``launcher`` and ``checkpoint``: instances, text
            (``"launcher=name:option=value"``), or mappings with ``kind`` and ``name``.
        callbacks: Objects whose methods ``fabric.call`` calls.
        loggers: What takes metrics.
        check: Compare, before each collective, backward pass and step, what the ranks are about to do; for finding out
            why a program hangs, as it costs some operations of the store each time.
        warn_after: After how many seconds in a collective of Fabric's own a line says which ranks wait where; ``None``
            is never.
        lock: A lock file, as ``fabric-core plugins lock`` writes it: no other plugin is imported, whatever is
            installed.

    Every plugin is a name, a name with options (``"name:option=value"``), a mapping, or an instance.
    What is left at its default is filled from the variables ``FABRIC_ACCELERATOR``, ``FABRIC_STRATEGY``,
    ``FABRIC_DEVICES``, ``FABRIC_NUM_NODES``, ``FABRIC_PRECISION``, ``FABRIC_WRAPPERS``, ``FABRIC_LOGGERS``,
    ``FABRIC_CHECK``, ``FABRIC_WARN_AFTER`` and ``FABRIC_LOCK``, and then from the
    configuration file that ``FABRIC_CONFIG`` names.

    Raises:
        RequestError: An argument can't be parsed.
        PluginError: A plugin is not available, or can't be loaded.
        LockError: The lock doesn't let a plugin run, or can't be read.
        PlanError: The choices don't fit together.
    """

    _setup: Setup
    _checkpointing: Checkpointing

    def __init__(
        self,
        *,
        accelerator: Any = "auto",
        strategy: Any = "auto",
        devices: Any = "auto",
        num_nodes: int = 1,
        precision: Any = None,
        wrappers: Any = None,
        plugins: Any = None,
        callbacks: Any = None,
        loggers: Any = None,
        check: bool = False,
        warn_after: float | None = 30.0,
        lock: str | os.PathLike[str] | None = None,
    ) -> None:
        code = {
            "accelerator": accelerator,
            "strategy": strategy,
            "devices": devices,
            "num_nodes": num_nodes,
            "precision": precision,
            "wrappers": wrappers,
            "plugins": plugins,
            "callbacks": callbacks,
            "loggers": loggers,
            "check": check,
            "warn_after": warn_after,
            "lock": lock,
        }
        self._request = Request.of(**fill(code, read_outside(environment())))
        self._build()

    @classmethod
    def from_config(cls, path: str | Path, **arguments: Any) -> Self:
        """Make one from a configuration file.

        Args:
            path: A TOML or YAML file whose keys are the arguments of ``Fabric``, apart from ``callbacks``.
            arguments: Arguments that win over the file and over the variables ``FABRIC_*``.

        Raises:
            RequestError: The file can't be read or understood.
            NotInstalledError: It is YAML, and the package that reads YAML isn't installed.
        """
        return cls(**fill(arguments, read_outside(environment(), path)))

    def _build(self) -> None:
        own = set(vars(self))
        self._world: World | None = None
        self._collectives: Collectives = SingleProcess()
        assembly = assemble(self._request, environment(), self._rank)
        self._chosen, self._bindings, self._hooks = assembly.chosen, assembly.bindings, assembly.hooks
        self._plan = self._chosen.plan
        self._accelerator: Accelerator = self._chosen.one("accelerator")
        self._strategy: Strategy = self._chosen.one("strategy")
        self._precision: Precision = self._chosen.one("precision")
        self._wrappers: list[Wrapper] = self._chosen.all("wrapper")
        self._launchers = self._chosen.ranked("launcher")
        self._wrappers_by_name = numbered(
            [(choice.name, one) for choice, one in zip(self._plan.wrappers, self._wrappers, strict=True)]
        )
        self._checkpointing = Checkpointing(
            strategy=self._strategy,
            precision=self._precision,
            wrappers=self._wrappers_by_name,
            formats=self._chosen.ranked("checkpoint"),
            plan=self._plan.as_dict(),
            own=_own,
        )
        self._loggers: list[Logger] = self._chosen.all("logger")
        self._launcher: Launcher | None = None
        self._failures: Failures | None = None
        self._stopping: Stopping | None = None
        self._closing: finalize[..., Any] | None = None
        self._acts = Acts(self)
        self._at_exit: Any = None
        try:
            self._bindings.bind(self._acts)
            act = self._acts.step
            self._setup = Setup(self._strategy, self._precision, self._wrappers, self._plan.world_size, act)
            self._built = set(vars(self)) - own
            self._hooks.configured(fabric=self, plan=self._plan)
        except BaseException:
            self._bindings.undo()
            raise

    def __repr__(self) -> str:
        """Show what was chosen, and which of the processes this is."""
        single = [kind.name for kind in KINDS.values() if kind.count is Count.ONE]
        chosen = [f"{kind}={self._plan.of(kind)[0].text!r}" for kind in single]
        chosen += [f"devices={len(self._plan.device_indices)}", f"num_nodes={self._plan.num_nodes}"]
        state = "not launched" if self._world is None else f"rank {self._world.global_rank} of {self.world_size}"
        return f"<{type(self).__name__}({', '.join(chosen)}), {state}>"

    # What was chosen

    @property
    def plan(self) -> Plan:
        """What was chosen for every kind, and why; ``print`` shows a table."""
        return self._plan

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator that was chosen."""
        return self._accelerator

    @property
    def strategy(self) -> Strategy:
        """The strategy that was chosen."""
        return self._strategy

    @property
    def precision(self) -> Precision:
        """The precision that was chosen."""
        return self._precision

    @property
    def wrappers(self) -> Mapping[str, Wrapper]:
        """The wrappers, in their order, by the names that they were chosen by; by class where an instance was given.

        The second of one name has ``#2`` after it.
        """
        return self._wrappers_by_name

    @property
    def loggers(self) -> list[Any]:
        """The loggers, as they were given."""
        return [getattr(logger, "original", logger) for logger in self._loggers]

    @property
    def logger(self) -> Any:
        """The first logger.

        Raises:
            NoLoggerError: There is none.
        """
        if not self._loggers:
            raise NoLoggerError("there is no logger", where="fabric.logger", instead="Fabric(loggers=...)")
        return self.loggers[0]

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process as the request, which is resolved again there, and what a subclass added."""
        own = {name: value for name, value in vars(self).items() if name not in {*self._built, "_built"}}
        return {"own": own, "registrations": registrations()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Resolve the request in this process."""
        for offer in state["registrations"]:
            register(offer.kind, offer.name, offer.loaded, override=True, auto=offer.auto)
        self.__dict__.update(state["own"])
        self._build()

    def run(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002 - an override takes them
        """Override to put the training into a subclass; call ``fabric.launch(...)`` from it.

        Raises:
            MisuseError: It is not overridden.
        """
        raise MisuseError(
            "run is not overridden",
            where=type(self).__name__,
            instead="def run(self, ...): in a subclass",
        )

    # State

    def save(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Any],
        filter: Mapping[str, Callable[[str, Any], bool]] | None = None,  # noqa: A002 - Lightning Fabric's
        asynchronous: bool | Literal["queued"] = False,
        *,
        format: str | None = None,  # noqa: A002 - what it is called everywhere
        keep: int | None = None,
        score: float | None = None,
    ) -> SaveHandle | None:
        """Save a state; every rank must call it.

        Args:
            path: Where to: a path, or a URL such as ``"s3://bucket/name"``.
            state: Models, optimizers, objects with ``state_dict`` and plain values, under their names, nested in dicts,
                lists and tuples as deep as one likes.
            filter: For a name of the state, which of its entries to save.
            asynchronous: Return once the state is copied to host memory, and write in the background; an earlier save
                that is still written is waited for, unless this is ``"queued"``.
            format: The checkpoint format; else the path's ending chooses it, or what the strategy's state is.
            keep: How many checkpoints stay of those beside this one whose names differ in numbers alone.
            score: With ``keep``, those with the lowest scores stay, not the newest.

        Returns:
            Where ``asynchronous``, a handle; its ``result()`` waits.

        Raises:
            CheckpointError: It can't be written, or holds what could not be read again; on every rank. What lay there
                before is still there.
        """
        options = {"filter": filter, "asynchronous": asynchronous, "format": format, "keep": keep, "score": score}
        handle: SaveHandle | None = self._acts.save(path, state, options)
        return handle

    def load(
        self,
        path: str | os.PathLike[str],
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint into a state, in place; every rank must call it.

        Args:
            path: Where from; ``folder/latest`` is the newest checkpoint of a folder, if nothing has that name.
            state: What to fill; ``None`` returns everything that the checkpoint has.
            strict: Everything that the state asks for must be there.
            weights_only: ``None`` and ``True`` read data alone; ``False`` also makes pickled objects, which runs what
                the file says: only for a file that you trust.

        Returns:
            What the checkpoint has beyond the state.

        Raises:
            CheckpointError: There is no checkpoint, or it can't be read or doesn't fit; on every rank, and nothing has
                changed.
        """
        return self._acts.load(path, state, {"strict": strict, "weights_only": weights_only})

    def load_raw(
        self, path: str | os.PathLike[str], obj: Any, strict: bool = True, *, weights_only: bool | None = None
    ) -> None:
        """Load a file that holds one bare state dict into one model or optimizer; ``weights_only`` as for ``load``."""
        self._checkpointing.load_raw(path, obj, self._connected(), strict=strict, weights_only=weights_only)

    @property
    def random_state(self) -> RandomState:
        """The random numbers of this process, for the state that ``save`` and ``load`` are given; each rank's is saved.

        Python's, NumPy's, PyTorch's, and those of the accelerator's current device.
        """
        return RandomState()

    # Saying what happens

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of every callback that has it, with the arguments, and the keywords that it takes.

        Raises:
            TypeError: A callback's attribute of that name can't be called.
        """
        reporting.call(self._request.callbacks, hook_name, args, kwargs)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Give a number to the loggers, on rank 0; without a logger, nothing happens."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Give numbers to the loggers, on rank 0; without a logger, nothing happens.

        Args:
            metrics: Under their names numbers, or tensors and arrays of one element; what else there is goes to the
                loggers as it is.
            step: The step that they belong to; not given, each logger counts.

        Raises:
            RequestError: A tensor or array has several elements, or none.
        """
        if not self._loggers or not self.is_global_zero:
            return
        numbers = reporting.numbers(metrics)
        for logger in self._loggers:
            logger.log_metrics(numbers, step)

    def track(self, iterable: Iterable[T], description: str = "", total: int | None = None) -> Iterator[T]:
        """Iterate, and show on rank 0 how far it is and how many items a second it does.

        Args:
            iterable: What to iterate over, such as a loader.
            description: Goes before the bar.
            total: The number of items; not given, ``len(iterable)``, where it has one.
        """
        return track(iterable, description, total) if self.is_global_zero else iter(iterable)

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed Python, NumPy and PyTorch, the same on every rank; as ``fabric_core.seed_everything``."""
        return seeding.seed_everything(seed, bool(workers), verbose)


def _own(value: Any) -> Any:
    """Give the user's own model or optimizer, which is what a strategy knows; loaders keep their own state."""
    return value if isinstance(value, FabricDataLoader) else unwrap(value)
