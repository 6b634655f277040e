"""Rules for checkpoint formats."""

from typing import Final

from fabric_core.conformance.rule import Rule
from fabric_core.conformance.rules.checkpoint import answers, damage, parts, remote, strangers, values, writing

__all__ = ["TABLE"]

_PARTS: Final = (values, answers, writing, damage, strangers, parts, remote)

TABLE: Final[tuple[Rule, ...]] = tuple(
    sorted((rule for part in _PARTS for rule in part.TABLE), key=lambda rule: rule.id)
)
"""All of them, in the order of their numbers."""
