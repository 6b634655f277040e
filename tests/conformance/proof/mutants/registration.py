"""Wrong in how they are found, made and sent."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict

from fabric_core.conformance.references import Host, Remembering
from fabric_core.contracts import Logger, PluginOptions
from proof.mutants import Mutants

MUTANTS = Mutants()
mutant = MUTANTS.mutant

MUTANTS.elsewhere(
    "logger",
    "proof.mutants.loud:Loud",
    "draws a random number, prints and imports something heavy when it is imported",
    "REG-002",
    "REG-003",
    "REG-004",
)


@mutant("has a name that can't be written in a string", "REG-001", name="two words")
class Unspeakable(Remembering):
    pass


@mutant(
    "leaves an abstract method",
    "LOG-701",
    "LOG-702",
    "REG-005",
    "REG-007",
    "REG-008",
    "REG-009",
    "REG-010",
    "REG-011",
    "REG-012",
    "REG-013",
    "REG-014",
    "REG-015",
    "REG-016",
    "REG-017",
    "REG-018",
)
class Unfinished(Remembering):
    log_metrics = Logger.log_metrics


@mutant(
    "was written for an old version of the contracts",
    "LOG-701",
    "LOG-702",
    "REG-005",
    "REG-006",
    "REG-007",
    "REG-008",
    "REG-009",
    "REG-010",
    "REG-011",
    "REG-012",
    "REG-013",
    "REG-014",
    "REG-015",
    "REG-016",
    "REG-017",
    "REG-018",
)
class Outdated(Remembering):
    api_version: ClassVar[int] = 0


@mutant(
    "gives an argument a default value",
    "LOG-701",
    "LOG-702",
    "REG-005",
    "REG-007",
    "REG-008",
    "REG-009",
    "REG-010",
    "REG-011",
    "REG-012",
    "REG-013",
    "REG-014",
    "REG-015",
    "REG-016",
    "REG-017",
    "REG-018",
)
class Defaulted(Remembering):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)


@mutant(
    "says that it is of another kind",
    "REG-005",
    "REG-007",
    "REG-008",
    "REG-009",
    "REG-010",
    "REG-011",
    "REG-012",
    "REG-013",
    "REG-014",
    "REG-015",
    "REG-016",
    "REG-017",
    "REG-018",
    "WRA-401",
    "WRA-402",
    "WRA-403",
    "WRA-404",
    "WRA-405",
    "WRA-406",
    "WRA-407",
    "WRA-408",
    "WRA-409",
    "WRA-410",
    "WRA-411",
)
class Disguised(Remembering):
    kind: ClassVar[str] = "wrapper"


class LooseOptions(PluginOptions):
    """Options that take what they don't have."""

    model_config = ConfigDict(extra="allow")


@mutant(
    "takes options that it doesn't have",
    "LOG-701",
    "LOG-702",
    "REG-005",
    "REG-007",
    "REG-008",
    "REG-009",
    "REG-010",
    "REG-011",
    "REG-012",
    "REG-013",
    "REG-014",
    "REG-015",
    "REG-016",
    "REG-017",
    "REG-018",
)
class Loose(Remembering):
    Options = LooseOptions


class TupleOptions(PluginOptions):
    """Options that JSON changes."""

    names: Any = ("a", "b")


@mutant("has options that come back from JSON as something else", "REG-010")
class Untravelled(Remembering):
    Options = TupleOptions


class SoftOptions(PluginOptions):
    """Options that can be changed."""

    model_config = ConfigDict(frozen=False)
    level: int = 1


@mutant("lets its options be changed", "REG-011")
class Soft(Remembering):
    Options = SoftOptions


class LevelOptions(PluginOptions):
    """Options with a level."""

    level: int = 1


@mutant("ignores keyword arguments", "REG-012", options={"level": 2})
class Deaf(Remembering):
    Options = LevelOptions

    def __init__(self, options: PluginOptions | None = None, /, **_given: Any) -> None:
        super().__init__(options)


@mutant("draws a random number when it is made", "REG-013")
class Rolling(Remembering):
    def __init__(self, options: PluginOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        torch.rand(1)


@mutant("keeps what it is told on the class", "REG-014")
class Shared(Remembering):
    seen: ClassVar[dict[str, float]] = {}


@mutant("doesn't pickle", "REG-015")
class Stuck(Remembering):
    def __reduce__(self) -> Any:
        raise TypeError("it holds a lock")


@mutant("is something else in another process", "REG-016")
class Elsewhere(Remembering):
    def __repr__(self) -> str:
        return f"Elsewhere(process={os.getpid()})"


@mutant("describes itself by nothing", "REG-017")
class Mute(Remembering):
    __doc__ = ""


@mutant("shows itself as an address", "REG-018")
class Anonymous(Remembering):
    def __repr__(self) -> str:
        return "<an object>"


@mutant("takes the automatic choice from everybody", "REG-020", auto=1_000_000)
class Greedy(Host):
    pass


@mutant(
    "has capabilities of no model",
    "ACC-101",
    "ACC-102",
    "ACC-103",
    "ACC-104",
    "ACC-105",
    "ACC-106",
    "ACC-107",
    "ACC-108",
    "ACC-109",
    "ACC-110",
    "ACC-111",
    "ACC-112",
    "ACC-113",
    "ACC-115",
    "ACC-118",
    "ACC-124",
    "REG-005",
    "REG-007",
    "REG-008",
    "REG-009",
    "REG-010",
    "REG-011",
    "REG-012",
    "REG-013",
    "REG-014",
    "REG-015",
    "REG-016",
    "REG-017",
    "REG-018",
)
class Formless(Host):
    capabilities = {"start_methods": ("spawn",)}  # type: ignore[assignment] # noqa: RUF012 - the mutation
