"""Rules for launchers: they recognise ranks, or start them, and leave nothing."""

from typing import Final

from fabric_core.conformance.rule import Rule
from fabric_core.conformance.rules.launcher import commands, detecting, ending, starting

__all__ = ["TABLE"]

TABLE: Final[tuple[Rule, ...]] = tuple(
    sorted((rule for part in (detecting, starting, ending, commands) for rule in part.TABLE), key=lambda rule: rule.id)
)
"""All of them, in the order of their numbers."""
