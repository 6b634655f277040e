"""A plugin of pytest for ``proof.own --trace``: coverage learns which test runs, and what each needed is kept."""

import json
from pathlib import Path
from typing import Any, Final

import coverage
import pytest

_FACTS: Final[dict[str, dict[str, Any]]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep which tests use ranks that stay up."""
    for item in items:
        pool = not {"two_ranks", "four_ranks"}.isdisjoint(getattr(item, "fixturenames", ()))
        _FACTS[item.nodeid] = {"seconds": 0.0, "pool": pool, "failed": False}


def _switch(item: pytest.Item) -> None:
    running = coverage.Coverage.current()
    if running is not None:
        running.switch_context(item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tell coverage, before the test's fixtures are made."""
    _switch(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Tell it again: a test may have switched coverage's context by a program of its own."""
    _switch(item)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep how long each test lasts, and whether it fails."""
    facts = _FACTS.get(report.nodeid)
    if facts is not None:
        facts["seconds"] += report.duration
        facts["failed"] |= report.failed


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was kept."""
    path = Path(str(session.config.rootpath)) / "build" / "traces" / "tests.json"
    path.write_text(json.dumps(_FACTS), encoding="utf-8")
