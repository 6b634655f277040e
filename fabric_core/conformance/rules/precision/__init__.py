"""Rules for precisions: what they say in their policy is what happens, and nothing else does."""

from typing import Final

from fabric_core.conformance.rule import Rule
from fabric_core.conformance.rules.precision import (
    batches,
    contexts,
    gradients,
    modules,
    orders,
    policy,
    scaling,
    steps,
    trainings,
)

__all__ = ["TABLE"]

_PARTS: Final = (policy, modules, batches, contexts, gradients, steps, scaling, trainings, orders)

TABLE: Final[tuple[Rule, ...]] = tuple(
    sorted((rule for part in _PARTS for rule in part.TABLE), key=lambda rule: rule.id)
)
"""All of them, in the order of their numbers."""
