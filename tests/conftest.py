"""What all tests share."""

from collections.abc import Iterator

import pytest

from fabric_core.conformance.pool import RankPool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Give two ranks that stay up for the whole session."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Give four ranks that stay up for the whole session."""
    with RankPool(4) as pool:
        yield pool
