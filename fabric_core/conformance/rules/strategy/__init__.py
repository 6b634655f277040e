"""Rules for strategies: several processes train as one does."""

from typing import Final

from fabric_core.conformance.rule import Rule
from fabric_core.conformance.rules.strategy import (
    asynchronous,
    clipping,
    collectives,
    extensions,
    gradients,
    life,
    memory,
    models,
    modules,
    optimizers,
    scripts,
    sequences,
    state,
    tensors,
    types,
    unfilled,
    unsynchronized,
)

__all__ = ["TABLE"]

_PARTS: Final = (
    gradients,
    models,
    modules,
    optimizers,
    clipping,
    collectives,
    extensions,
    state,
    tensors,
    types,
    life,
    memory,
    sequences,
    scripts,
    asynchronous,
    unfilled,
    unsynchronized,
)

TABLE: Final[tuple[Rule, ...]] = tuple(
    sorted((rule for part in _PARTS for rule in part.TABLE), key=lambda rule: rule.id)
)
"""All of them, in the order of their numbers."""
