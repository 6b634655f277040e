"""Where rules are checked: the driver's bench, and each rank's place at it."""

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from fabric_core.conformance.numbers import computing_in, widest_of
from fabric_core.conformance.pool import RankHang, RankPool, RankRaised
from fabric_core.conformance.rule import Broken, without_kit
from fabric_core.conformance.snapshot import restored
from fabric_core.conformance.subject import Subject
from fabric_core.contracts import Plugin
from fabric_core.fabric import Fabric

__all__ = ["Bench", "Place", "folder_of_its_own"]

_TIMEOUT: Final = 20.0
"""How many seconds one measurement may take; ``FABRIC_TIMEOUT_SCALE`` multiplies it."""


_OURS: Final = frozenset({"FABRIC_TIMEOUT_SCALE", "FABRIC_DISABLE_PLUGINS"})
"""Variables that the ranks heed."""


class Bench:
    """The driver's side: runs measurements on ranks that stay up for one plugin.

    The driver never makes the plugin, which may hang or end its process. A check that makes it itself runs at a bench
    inside a rank.

    Args:
        subject: The plugin under test.
        device: The name of the accelerator to run on; ``None`` is the kit's own, the CPU.
        timeout: How many seconds one measurement may take; ``FABRIC_TIMEOUT_SCALE`` multiplies it.
        pools: Ranks that other benches use too, and that whoever made them ends.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        device: str | None = None,
        timeout: float = _TIMEOUT,
        pools: dict[int, RankPool] | None = None,
    ) -> None:
        self.subject = subject
        self.device = device
        self.world_size = 1
        self._timeout = timeout
        self._pools: dict[int, RankPool] = {} if pools is None else pools
        self._shared = pools is not None
        self._looked: tuple[dict[str, Any], str | None, torch.dtype] | Exception | None = None
        self._known: dict[Callable[..., Any], tuple[Any, Exception | None]] = {}

    @property
    def declared(self) -> dict[str, Any]:
        """What the plugin declares.

        Raises:
            Broken: It can't be made.
            RankHang: Making it hangs.
        """
        return self._look()[0]

    @property
    def device_type(self) -> str | None:
        """The type of the devices that it runs on; ``None`` where there is none."""
        return self._look()[1]

    @property
    def widest(self) -> torch.dtype:
        """The widest floating-point type that the plugin trains and the device has."""
        return torch.float64 if self._looked is None or isinstance(self._looked, Exception) else self._looked[2]

    def _new_place(self) -> "Place":
        return Place(self.subject, self.device, self.widest)

    def _look(self) -> tuple[dict[str, Any], str | None, torch.dtype]:
        if self._looked is None:
            try:
                self._looked = _run(self._pool(1), self._new_place(), _look, ())[0]
            except (Broken, RankHang) as error:
                self._looked = error
        if isinstance(self._looked, Exception):
            raise self._looked
        return self._looked

    def plugin(self) -> Any:
        """Make a new plugin; inside a rank alone.

        Raises:
            AssertionError: This is the driver.
        """
        raise AssertionError("a check that makes the plugin runs inside a rank: rule(..., inside=True)")

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``function(place, *args)`` on every rank.

        Returns:
            What each rank returned.

        Raises:
            Broken: A rank raised.
            RankHang: A rank did not come back.
        """
        return _run(self._pool(self.world_size), self._new_place(), function, args)

    def run_apart(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run as ``run`` does, in ranks that nothing was run in before, and that nothing is run in after.

        So what a plugin leaves neither hides itself nor poisons what is measured later.
        """
        self._end(self.world_size)
        try:
            return self.run(function, *args)
        finally:
            self._end(self.world_size)

    def _end(self, world_size: int) -> None:
        pool = self._pools.get(world_size)
        if pool is not None:
            pool.close()

    def fresh(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run ``function(place, *args)`` in a new process that has only PyTorch and the core imported.

        It may start processes of its own, which takes longer.
        """
        with RankPool(1, timeout=3 * self._timeout, parents=True) as pool:
            return _run(pool, self._new_place(), function, args)[0]

    def once(self, function: Callable[..., Any]) -> Any:
        """Give what ``fresh(function)`` gave, or raised, when it was first asked: what several rules want to know."""
        if function not in self._known:
            try:
                self._known[function] = self.fresh(function), None
            except (Broken, RankHang) as error:
                self._known[function] = None, error
        value, failure = self._known[function]
        if failure is not None:
            raise failure
        return value

    def check(self, check: Callable[..., None], *example: Any) -> None:
        """Run a check at a bench inside a rank.

        Raises:
            Broken: The rule isn't kept.
            RankHang: The rank did not come back.
        """
        message = _run(self._pool(1), self._new_place(), _check, (check, *example))[0]
        if message is not None:
            raise Broken(message)

    def close(self) -> None:
        """End the ranks, where no other bench has them too."""
        if self._shared:
            return
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _pool(self, world_size: int) -> RankPool:
        return self._pools.setdefault(world_size, RankPool(world_size, timeout=self._timeout))


class _Inside(Bench):
    """The bench inside a rank: the plugin is made in this process, and measurements run in it."""

    def __init__(self, place: "Place") -> None:
        super().__init__(place.subject)
        self._place = place

    @property
    def declared(self) -> dict[str, Any]:
        return self.subject.declared()

    def plugin(self) -> Any:
        return self._place.plugin()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [_measure(function, self._place, args)]

    def run_apart(self, function: Callable[..., Any], *_args: Any) -> list[Any]:
        raise AssertionError(f"{function.__name__} needs the driver: rule(..., inside=False)")

    def fresh(self, function: Callable[..., Any], *_args: Any) -> Any:
        raise AssertionError(f"{function.__name__} needs the driver: rule(..., inside=False)")


def _check(place: "Place", check: Callable[..., None], *example: Any) -> str | None:
    try:
        check(_Inside(place), *example)
    except Broken as broken:
        return str(broken)
    except Exception as error:  # noqa: BLE001 - the plugin may raise anything
        return f"{error!r}\n{without_kit(traceback.format_exc())}"
    return None


def _look(place: "Place") -> tuple[dict[str, Any], str | None, torch.dtype]:
    """Look at what the plugin declares, at the type of the device that it is to run on, and at the numbers of both."""
    from fabric_core.conformance.references import Host

    declared = place.subject.declared()
    host: Any = Host() if place.device is None else Subject.of("accelerator", place.device).make()
    there = host.is_available()
    types = declared.get("param_dtypes")
    named = {getattr(torch, one, None) for one in types or ()}
    widest = widest_of(lambda dtype: (types is None or dtype in named) and (not there or host.supports(dtype)))
    return declared, host.device_type if there else None, widest


def _run(pool: RankPool, place: "Place", function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    try:
        return pool.run(_measure, function, place, args)
    except RankRaised as error:
        # What a rank that raised has half made in PyTorch would keep it from meeting the others again.
        if pool.world_size > 1:
            pool.close()
        # The message of an error may go on in indented lines.
        last = [line for line in error.trace.strip().splitlines() if line[:1].strip()][-1]
        said = (
            f"rank {error.rank} raised {last}\n{without_kit(error.trace)}"
            if "\n" in error.trace.strip()
            else f"rank {error.rank}: {last}"
        )
        raise Broken(said) from None


def _measure(function: Callable[..., Any], place: "Place", args: tuple[Any, ...]) -> Any:
    """Run a measurement in a rank, and clear away what a wrong plugin left, so that the next one starts clean."""
    # What is installed beside the plugin must not act on its measurements.
    os.environ["FABRIC_EXTENSIONS"] = ""
    with restored():
        # What else is installed, or asked for by whoever runs the kit, takes no part.
        for name in [name for name in os.environ if name.startswith("FABRIC_") and name not in _OURS]:
            del os.environ[name]
        os.environ["FABRIC_EXTENSIONS"] = ""
        try:
            with computing_in(place.widest):
                return function(place, *args)
        finally:
            # Otherwise the measurements of one plugin use up how often a function may be compiled again.
            torch.compiler.reset()


@cache
def _store(port: int) -> Any:
    """Connect to the store of this rank's pool, once."""
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], port, wait_for_workers=False)


class Place:
    """A rank's side: makes the plugin, and a ``Fabric`` whose other parts are the kit's references.

    Args:
        subject: The plugin under test.
        device: The name of the accelerator to run on; ``None`` is the kit's own, the CPU.
        widest: The floating-point type of models and batches.
    """

    def __init__(self, subject: Subject, device: str | None, widest: torch.dtype = torch.float64) -> None:
        self.subject = subject
        self.device = device
        self.widest = widest

    @property
    def rank(self) -> int:
        """This rank."""
        return int(os.environ["RANK"])

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return int(os.environ["WORLD_SIZE"])

    def plugin(self) -> Any:
        """Make a new plugin."""
        return self.subject.make()

    @contextmanager
    def oracle(self) -> Iterator[Any]:
        """Open a process group of the kit's own, beside whatever group the plugin has."""
        import torch.distributed as dist

        store = dist.PrefixStore("oracle", _store(int(os.environ["MASTER_PORT"])))
        group = dist.ProcessGroupGloo(store, self.rank, self.world_size, timedelta(seconds=60))
        try:
            yield group
        finally:
            group.shutdown()

    @contextmanager
    def fabric(self, *, nodes: int = 1, extension: object | None = None, **parts: Plugin) -> Iterator[Fabric]:
        """Build a ``Fabric`` and launch it; torn down at the end.

        Args:
            nodes: On how many nodes the ranks are, equally many on each.
            extension: What goes round behaviours; there is nothing of the core's own.
            parts: Plugins by their kind, in the place of the kit's references.
        """
        fabric = self.unlaunched(nodes=nodes, extension=extension, **parts)
        with fabric:
            fabric.launch()
            self._meet()
            yield fabric

    def _meet(self) -> None:
        """Wait until every rank is connected: one that leaves at once would break the others' connecting."""
        if self.world_size == 1:
            return
        store = _store(int(os.environ["MASTER_PORT"]))
        meeting = store.add(f"kit/{self.rank}", 1)
        if store.add(f"kit/meeting/{meeting}", 1) == self.world_size:
            store.set(f"kit/met/{meeting}", "")
        store.wait([f"kit/met/{meeting}"])

    def store(self) -> Any:
        """Give a store that the ranks share, apart from every other one's keys."""
        import torch.distributed as dist

        return dist.PrefixStore("kit/given", _store(int(os.environ["MASTER_PORT"])))

    def unlaunched(self, *, nodes: int = 1, extension: object | None = None, **parts: Plugin) -> Fabric:
        """Build a ``Fabric``."""
        from fabric_core.conformance import references as kit

        parts = {self.subject.kind: self.plugin(), **parts} if self.subject.kind not in parts else dict(parts)
        wrapper, logger = parts.pop("wrapper", None), parts.pop("logger", None)
        return Fabric(
            accelerator=parts.pop("accelerator", None) or self.device or kit.Host(),
            strategy=parts.pop("strategy", None) or (kit.Averaging() if self.world_size > 1 else kit.Alone()),
            precision=parts.pop("precision", None) or kit.Full(),
            devices=self.world_size // nodes,
            num_nodes=nodes,
            warn_after=None,
            wrappers=None if wrapper is None else [wrapper],
            loggers=None if logger is None else [logger],
            plugins=[
                parts.pop("launcher", None) or kit.Surroundings(),
                parts.pop("checkpoint", None) or kit.OneFile(),
                *([] if extension is None else [extension]),
            ],
        )


@contextmanager
def folder_of_its_own() -> Iterator[Path]:
    """Give a folder that is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="fabric-kit-") as folder:
        yield Path(folder)
