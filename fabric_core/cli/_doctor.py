"""Examines every plugin that is installed, each in a process of its own, so that even a crash is a row."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

from fabric_core.binding import Bindings, check_extension
from fabric_core.choosing.offers import Offer
from fabric_core.choosing.registry import Registry
from fabric_core.choosing.resolve import check_declared
from fabric_core.cli._output import progress
from fabric_core.contracts import Accelerator
from fabric_core.errors import (
    FabricError,
    IncompatibleApiError,
    LockError,
    NotInstalledError,
    OptionError,
    UnavailableError,
)
from fabric_core.kinds import EXTENSION, groups

__all__ = ["SOUND", "Finding", "examine"]

SOUND: Final = frozenset({"ok", "unavailable", "not installed", "switched off"})
"""What needs no fixing."""

_STATUS: Final = {
    UnavailableError: "unavailable",
    NotInstalledError: "not installed",
    IncompatibleApiError: "incompatible",
    LockError: "locked out",
}

_SLOW: Final = 1.0
"""From how many seconds on an import is worth a word."""


@dataclass(frozen=True)
class Finding:
    """What is to be said of one offer.

    Args:
        kind: The kind.
        name: The name.
        distribution: The distribution with its version.
        status: ``ok``, ``unavailable``, ``not installed``, ``switched off``, ``incompatible``, ``locked out``,
            ``quarantined``, ``conflict``, ``crashed``, ``hangs``, or ``not counted`` for an entry of ``fabric.auto``
            that is wrong.
        note: Why.
        seconds: How long it took to import and make.
    """

    kind: str
    name: str
    distribution: str
    status: str
    note: str = ""
    seconds: float = 0.0


def examine(registry: Registry, timeout: float, *, shown: bool = True) -> Iterator[Finding]:
    """Examine every offer.

    Args:
        registry: Where the offers are.
        timeout: How many seconds one may take.
        shown: Whether a terminal shows how far it is.
    """
    total = sum(len(registry.offers(kind)) for kind in groups())
    with progress("examining", total) if shown else nullcontext(lambda *_: None) as advance:
        for finding in _examine(registry, timeout):
            advance(1, f"{finding.kind} {finding.name}")
            yield finding


def _examine(registry: Registry, timeout: float) -> Iterator[Finding]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fabric_core.cli._doctor"])
    for stray in registry.strays:
        yield Finding("auto", stray.entry, stray.owner, "not counted", stray.reason)
    for kind in groups():
        offers = registry.offers(kind)
        for offer in offers:
            twins = [one.owner for one in offers if one.name == offer.name and one is not offer]
            if registry.is_disabled(offer):
                yield Finding(kind, offer.name, offer.owner, "switched off", "by FABRIC_DISABLE_PLUGINS")
                continue
            finding = _in_a_process(context, offer, timeout)
            if twins and kind != EXTENSION and finding.status in SOUND:
                note = f'{", ".join(twins)} offers the name too; choose with "{offer.distribution}/{offer.name}"'
                finding = Finding(kind, offer.name, offer.owner, "conflict", note, finding.seconds)
            yield finding


def _in_a_process(context: multiprocessing.context.ForkServerContext, offer: Offer, timeout: float) -> Finding:
    ours, theirs = context.Pipe()
    process = context.Process(target=_probe, args=(offer, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            return Finding(
                offer.kind, offer.name, offer.owner, "hangs", f"it took more than {timeout:.0f} s", float(timeout)
            )
        try:
            finding: Finding = ours.recv()
        except EOFError:
            process.join(timeout)
            code = process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            return Finding(offer.kind, offer.name, offer.owner, "crashed", f"importing it ended the process: {how}")
        return finding
    finally:
        ours.close()
        if process.is_alive():
            process.join(0.5)
            process.kill()
        process.join()


def _probe(offer: Offer, connection: Connection) -> None:
    """Import, make and bind one plugin, quietly, and tell."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(quiet, stream.fileno())
    start = time.perf_counter()
    status, note = _judge(offer)
    seconds = time.perf_counter() - start
    if status == "ok" and seconds > _SLOW:
        note = "slow to import: import heavy parts in the methods that need them"
    connection.send(Finding(offer.kind, offer.name, offer.owner, status, note, seconds))


def _judge(offer: Offer) -> tuple[str, str]:
    try:
        return _use(offer)
    except BaseException as error:  # noqa: BLE001 - whatever a plugin does when it is made is what is examined
        status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), "quarantined")
        return status, str(error) if isinstance(error, FabricError) else repr(error)


def _use(offer: Offer) -> tuple[str, str]:
    if offer.kind == EXTENSION:
        check_extension(offer.make_extension())
        return "ok", ""
    preset = offer.load()
    try:
        preset.plugin.parse_options(preset.options)
    except OptionError as error:
        return "ok", f"it can't be used without options: {error.what}"
    plugin = offer.make({})
    Bindings().bind(plugin)
    if isinstance(plugin, Accelerator) and not plugin.is_available():
        return "unavailable", "no such device can be used here"
    check_declared(plugin)
    return "ok", ""
