"""The rules, by kind."""

from typing import Final

from fabric_core.conformance.rule import Rule
from fabric_core.conformance.rules import (
    accelerator,
    checkpoint,
    launcher,
    logger,
    precision,
    registration,
    strategy,
    wrapper,
)

__all__ = ["RULES", "RULES_BY_ID", "rules_for"]

RULES: Final[tuple[Rule, ...]] = (
    *registration.TABLE,
    *accelerator.TABLE,
    *precision.TABLE,
    *strategy.TABLE,
    *wrapper.TABLE,
    *launcher.TABLE,
    *checkpoint.TABLE,
    *logger.TABLE,
)
"""All rules, in their order."""

RULES_BY_ID: Final = {rule.id: rule for rule in RULES}


def rules_for(kind: str) -> tuple[Rule, ...]:
    """Give the rules that bind a kind of plugin."""
    return tuple(rule for rule in RULES if rule.kind in {"any", kind})
