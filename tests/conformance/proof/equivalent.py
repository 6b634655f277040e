"""Changes that no rule can notice, each with the reason: what they change makes no difference that anybody sees."""

from collections.abc import Mapping
from typing import Final

__all__ = ["EQUIVALENT"]

EQUIVALENT: Final[Mapping[str, str]] = {}
