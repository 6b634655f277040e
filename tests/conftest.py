"""What all tests share: ranks that stay up, and which cases of large tables a plain run draws."""

import os
import random
import signal
from collections.abc import Iterator
from typing import Final, Literal

import pytest

from fabric_core.conformance.pool import RESOLVER, RankPool

SEED: Final = os.environ.setdefault("FABRIC_SAMPLE_SEED", str(random.randrange(10**6)))  # noqa: S311 - of tests
"""What a plain run draws follows from it, also where a test draws itself."""

os.environ.setdefault("RES_OPTIONS", RESOLVER)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As a shell starts what runs in the background; processes that the tests start would ignore Ctrl-C too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--whole``."""
    parser.addoption("--whole", action="store_true", help="run every case, those too that a plain run only samples")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say how to draw the same cases again."""
    return None if config.getoption("--whole") else f"sample: FABRIC_SAMPLE_SEED={SEED} draws the same cases again"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests marked ``sampled(share)`` keep that share of the cases, others each time; all that were named."""
    if config.getoption("--whole") or any("::" in one for one in config.invocation_params.args if isinstance(one, str)):
        return
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        marker = item.get_closest_marker("sampled")
        drawn = marker is None or random.Random(f"{SEED} {item.nodeid}").random() < marker.args[0]  # noqa: S311
        (kept if drawn else left).append(item)
    items[:] = kept
    if left:
        config.hook.pytest_deselected(items=left)


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    """Give what a test draws its own cases from."""
    return random.Random(f"{SEED} {request.node.nodeid}")  # noqa: S311 - a choice of tests


def _life(fixture_name: str, config: pytest.Config) -> Literal["session", "module"]:
    """Ranks stay up for all tests; where lines are traced to tests, for those of one file."""
    return "module" if config.pluginmanager.has_plugin("proof.tracing") else "session"


@pytest.fixture(scope=_life)
def two_ranks() -> Iterator[RankPool]:
    """Give two ranks that stay up."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope=_life)
def four_ranks() -> Iterator[RankPool]:
    """Give four ranks that stay up."""
    with RankPool(4) as pool:
        yield pool
