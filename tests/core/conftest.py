"""In-memory plugins for the core's own tests: the smallest of each kind."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fabric_core.choosing.registry import registered
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import (
    Accelerator,
    Checkpoint,
    Logger,
    Plugin,
    PluginOptions,
    Precision,
    PrecisionPolicy,
    Strategy,
    StrategyCapabilities,
    World,
)


class Host(Accelerator):
    """The processor that runs the tests."""

    @property
    def device_type(self) -> str:
        return "cpu"

    @property
    def process_group_backend(self) -> str:
        return "none"

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def devices(self, indices: Sequence[int]) -> list[torch.device]:
        return [torch.device("cpu") for _ in indices]

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype != torch.float16


class AloneOptions(PluginOptions):
    """One option, to be misspelt."""

    patience: int = 3


class Alone(Strategy):
    """One process; counts what it is asked to do."""

    Options = AloneOptions
    capabilities = StrategyCapabilities(max_world_size=1)

    def __init__(self, options: AloneOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self.seen: list[str] = []

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        self.seen.append(f"connect {world.world_size}")
        return SingleProcess()

    def teardown(self) -> None:
        self.seen.append("teardown")


class Plain(Precision):
    """Leaves every number as it is."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy()


class Shelf(Checkpoint):
    """Keeps state trees in memory."""

    trees: ClassVar[dict[Path, Mapping[str, Any]]] = {}

    def recognises(self, path: Path) -> bool:
        return path in self.trees

    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        self.trees[path] = torch.utils._pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, dict(tree)
        )

    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        return dict(self.trees[path])


class Notebook(Logger):
    """Keeps metrics in memory."""

    def __init__(self, options: PluginOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self.rows: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        self.rows.append((dict(metrics), step))


@pytest.fixture
def in_memory() -> Iterator[dict[str, Any]]:
    """Register the smallest plugins; gives the arguments of ``Fabric`` that choose them."""
    offers: tuple[tuple[str, str, type[Plugin]], ...] = (
        ("accelerator", "host", Host),
        ("strategy", "alone", Alone),
        ("precision", "plain", Plain),
    )
    contexts = [registered(kind, name, plugin, auto=1) for kind, name, plugin in offers]
    for context in contexts:
        context.__enter__()
    try:
        yield {
            "accelerator": "host",
            "strategy": "alone",
            "precision": "plain",
            "devices": 1,
            "plugins": [Shelf()],
            "loggers": Notebook(),
        }
    finally:
        for context in reversed(contexts):
            context.__exit__(None, None, None)
        Shelf.trees.clear()
