"""Rules for loggers."""

import os
from pathlib import Path
from typing import Final

from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import folder_of_its_own
from fabric_core.conformance.rule import Table

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


TABLE.untested(
    "LOG-703",
    "What was logged is found where the logger says that it writes.",
    reason="Every service and file format keeps it elsewhere; the kit can't read them all.",
    advice="log a number in your own tests, and read it back",
)
