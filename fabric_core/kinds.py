"""The table of kinds: whatever lists the kinds, or the arguments of ``Fabric``, derives from it.

A new kind is a row here and a contract. One with an argument of its own also gets a parameter of ``Fabric.__init__``,
which is written out for editors and type checkers; a test holds the two together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from fabric_core.contracts import (
    Accelerator,
    Checkpoint,
    Launcher,
    Logger,
    Plugin,
    Precision,
    Strategy,
    Wrapper,
)

__all__ = ["AUTO", "AUTO_GROUP", "EXTENSION", "KINDS", "Count", "Kind", "argument_defaults", "by_attribute", "groups"]

AUTO: Final = "auto"
"""Leaves a choice to the plan."""

EXTENSION: Final = "extension"
"""Stands for a kind where an extension is meant, which implements no contract."""

AUTO_GROUP: Final = "fabric.auto"
"""The entry-point group by which a distribution offers its plugins to the automatic choice."""

_EXTENSIONS: Final = "fabric.extensions"


class Count(Enum):
    """How many plugins of a kind a ``Fabric`` has."""

    ONE = "one"
    """Exactly one: the named one, or the first of the automatic ones that fits. It belongs to one ``Fabric``."""
    MANY = "many"
    """Those that are named, in that order; never chosen automatically."""
    RANKED = "ranked"
    """The named one alone, or all automatic ones, asked one after the other and loaded when it is their turn."""


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    Args:
        name: What the kind is called.
        contract: What its plugins implement.
        group: The entry-point group in which they are named.
        count: How many a ``Fabric`` has.
        argument: The argument of ``Fabric`` that takes them; without one they go into ``plugins``.
        default: What that argument is when it is left out.
        in_plugins: Whether they may go into ``plugins``.
    """

    name: str
    contract: type[Plugin]
    group: str
    count: Count
    argument: str | None = None
    default: Any = None
    in_plugins: bool = False

    @property
    def attribute(self) -> str:
        """What they are called in a plan: the kind for one, its plural for several."""
        return self.name if self.count is Count.ONE else self.group.rpartition(".")[2]


KINDS: Final[dict[str, Kind]] = {
    kind.name: kind
    for kind in (
        Kind("accelerator", Accelerator, "fabric.accelerators", Count.ONE, "accelerator", AUTO),
        Kind("strategy", Strategy, "fabric.strategies", Count.ONE, "strategy", AUTO),
        Kind("precision", Precision, "fabric.precisions", Count.ONE, "precision", in_plugins=True),
        Kind("wrapper", Wrapper, "fabric.wrappers", Count.MANY, "wrappers"),
        Kind("launcher", Launcher, "fabric.launchers", Count.RANKED, in_plugins=True),
        Kind("checkpoint", Checkpoint, "fabric.checkpoints", Count.RANKED, in_plugins=True),
        Kind("logger", Logger, "fabric.loggers", Count.MANY, "loggers"),
    )
}
"""The kinds by their names."""


def groups() -> Mapping[str, str]:
    """Give the entry-point group of each kind, and of extensions."""
    return {**{kind.name: kind.group for kind in KINDS.values()}, EXTENSION: _EXTENSIONS}


def argument_defaults() -> Mapping[str, Any]:
    """Give the arguments of ``Fabric(...)`` and what each says when it is left out."""
    return {
        **{kind.argument: kind.default for kind in KINDS.values() if kind.argument is not None},
        "devices": AUTO,
        "num_nodes": 1,
        "plugins": None,
        "callbacks": None,
        "check": False,
        "warn_after": 30.0,
        "lock": None,
    }


def by_attribute(name: str) -> str | None:
    """Give the kind that a plan calls by this name, if there is one."""
    if name == "extensions":
        return EXTENSION
    return next((kind.name for kind in KINDS.values() if kind.attribute == name), None)
