"""Rules for accelerators."""

from typing import Final

from fabric_core.conformance.rule import Rule
from fabric_core.conformance.rules.accelerator import asking, computing, life, parsing, types

__all__ = ["TABLE"]

_PARTS: Final = (asking, parsing, computing, life, types)

TABLE: Final[tuple[Rule, ...]] = tuple(
    sorted((rule for part in _PARTS for rule in part.TABLE), key=lambda rule: rule.id)
)
"""All of them, in the order of their numbers."""
