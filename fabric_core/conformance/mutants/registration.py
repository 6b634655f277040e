"""Wrong in how they are found, made and sent."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict

from fabric_core.conformance.mutants import Mutants
from fabric_core.conformance.references import Host, Remembering
from fabric_core.contracts import AcceleratorCapabilities, Logger, PluginOptions

MUTANTS = Mutants()
mutant = MUTANTS.mutant

MUTANTS.elsewhere(
    "logger",
    "fabric_core.conformance.mutants.loud:Loud",
    "draws a random number, prints and imports something heavy when it is imported",
)


@mutant("has a name that can't be written in a string", name="two words")
class Unspeakable(Remembering):
    pass


@mutant("leaves an abstract method")
class Unfinished(Remembering):
    log_metrics = Logger.log_metrics


@mutant("was written for an old version of the contracts")
class Outdated(Remembering):
    api_version: ClassVar[int] = 0


@mutant("gives an argument a default value")
class Defaulted(Remembering):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)


@mutant("says that it is of another kind")
class Disguised(Remembering):
    kind: ClassVar[str] = "wrapper"


class LooseOptions(PluginOptions):
    """Options that take what they don't have."""

    model_config = ConfigDict(extra="allow")


@mutant("takes options that it doesn't have")
class Loose(Remembering):
    Options = LooseOptions


class TupleOptions(PluginOptions):
    """Options that JSON changes."""

    names: Any = ("a", "b")


@mutant("has options that come back from JSON as something else")
class Untravelled(Remembering):
    Options = TupleOptions


class SoftOptions(PluginOptions):
    """Options that can be changed."""

    model_config = ConfigDict(frozen=False)
    level: int = 1


@mutant("lets its options be changed")
class Soft(Remembering):
    Options = SoftOptions


class LevelOptions(PluginOptions):
    """Options with a level."""

    level: int = 1


@mutant("ignores keyword arguments", options={"level": 2})
class Deaf(Remembering):
    Options = LevelOptions

    def __init__(self, options: PluginOptions | None = None, /, **_given: Any) -> None:
        super().__init__(options)


@mutant("draws a random number when it is made")
class Rolling(Remembering):
    def __init__(self, options: PluginOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        torch.rand(1)


@mutant("keeps what it is told on the class")
class Shared(Remembering):
    seen: ClassVar[dict[str, float]] = {}


@mutant("doesn't pickle")
class Stuck(Remembering):
    def __reduce__(self) -> Any:
        raise TypeError("it holds a lock")


@mutant("is something else in another process")
class Elsewhere(Remembering):
    def __repr__(self) -> str:
        return f"Elsewhere(process={os.getpid()})"


@mutant("says nothing about itself")
class Mute(Remembering):
    __doc__ = ""


@mutant("shows itself as an address")
class Anonymous(Remembering):
    def __repr__(self) -> str:
        return "<an object>"


@mutant("takes the automatic choice from everybody")
class Greedy(Host):
    capabilities = AcceleratorCapabilities(priority=1_000_000)


@mutant("has capabilities of no model")
class Formless(Host):
    capabilities = {"priority": 0}  # type: ignore[assignment] # noqa: RUF012 - the mutation
