"""Rules for loggers."""

import contextlib
import os
from pathlib import Path
from typing import Final

import torch

from fabric_core.conformance import snapshot
from fabric_core.conformance.bench import Bench, Place, folder_of_its_own
from fabric_core.conformance.rule import Broken, Table
from fabric_core.errors import FabricError

TABLE: Final = Table("logger")


def _log(place: Place) -> None:
    with folder_of_its_own() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            plugin = place.plugin()
            plugin.log_hyperparams({"rate": 0.5, "layers": [1, 2], "name": "text", "nested": {"a": None}})
            plugin.log_metrics({"loss": 1.5}, 0)
            plugin.log_metrics({"loss": 1.25, "accuracy": 0.5}, None)
            plugin.log_metrics({}, 2)
            plugin.log_metrics({"loss": float("nan"), "other": float("inf")}, 3)
            plugin.finalize("success")
            plugin.finalize("success")
        finally:
            os.chdir(before)


@TABLE.rule(
    "LOG-701",
    "It takes metrics with and without a step, new names, none at all, and numbers that are not finite.",
    reason="A training must not end because of what it logs; a loss that diverged is worth seeing.",
    advice="write what comes; count steps yourself where there is none",
)
def _takes(bench: Bench) -> None:
    bench.run(_log)


def _finalize(place: Place, times: int) -> None:
    with folder_of_its_own() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            plugin = place.plugin()
            for _ in range(times):
                plugin.finalize("failed")
        finally:
            os.chdir(before)


@TABLE.rule(
    "LOG-702",
    "`finalize` may be called without any metric, and twice.",
    reason="A training that fails at once is torn down too.",
    advice="close what is open, and forget it",
)
def _finalizes(bench: Bench) -> None:
    bench.run(_finalize, 2)


def _hold(place: Place) -> list[str]:
    """Log and finish; name what is another afterwards."""
    with folder_of_its_own() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            place.plugin()  # what libraries change as they are imported is not the logger's
            look = snapshot.take()
            params = {"rate": 0.5, "path": Path("x"), "type": torch.float32, "nested": {"list": [1, {"a": None}]}}
            metrics = {"loss": 1.5, "accuracy": 0.5}
            given = (repr(params), repr(metrics))
            plugin = place.plugin()
            plugin.log_hyperparams(params)
            plugin.log_metrics(metrics, 3)
            changed = ["what was handed over"] if (repr(params), repr(metrics)) != given else []
            plugin.finalize("success")
            with contextlib.suppress(FabricError):
                plugin.log_metrics({"late": 1.0}, 4)
            plugin.finalize("failed")
            # It writes where it is told, which is here.
            return [*changed, *(name for name in snapshot.differences(look) if name != "the working folder")]
        finally:
            os.chdir(before)


@TABLE.rule(
    "LOG-704",
    "It leaves what it is given as it was, takes settings of any type, and once finished leaves the process as it was; "
    "a metric after that is taken, or refused by an error of this project's.",
    reason="Settings and metrics are the script's own; so are its hooks, threads and log handlers.",
    advice="copy what is changed, write others by their text, and close in finalize what was opened",
    inside=False,
)
def _leaves(bench: Bench) -> None:
    changed = bench.run_apart(_hold)[0]
    if changed:
        raise Broken(f"changed: {', '.join(changed)}")


TABLE.untested(
    "LOG-703",
    "What was logged is found where the logger says that it writes.",
    reason="Every service and file format keeps it elsewhere; the kit can't read them all.",
    advice="log a number in your own tests, and read it back",
)
