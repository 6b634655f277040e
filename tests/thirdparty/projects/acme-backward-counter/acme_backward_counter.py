"""A third party's extension: counts the backward passes of whatever strategy was chosen."""

import sys
from collections.abc import Generator
from typing import Any

from fabric_core import around, hookimpl
from fabric_core.contracts import World


class BackwardCounter:
    """Says at the end how many backward passes there were."""

    def __init__(self) -> None:
        self.count = 0
        self.rank = 0

    @hookimpl
    def launched(self, world: World) -> None:
        """Remember the rank."""
        self.rank = world.global_rank

    @around.strategy
    def backward(self) -> Generator[None, Any, Any]:
        """Count one that came to its end."""
        result = yield
        self.count += 1
        return result

    @hookimpl
    def torn_down(self) -> None:
        """Say it."""
        sys.stderr.write(f"rank {self.rank}: {self.count} backward passes\n")
