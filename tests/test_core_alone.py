"""The core stands alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_ALONE = """
import importlib.metadata as metadata, sys
import pytest

# As in an environment that has the core and no plugin at all.
sys.modules["fabric_plugins"] = None
every = metadata.Distribution.entry_points
metadata.Distribution.entry_points = property(lambda distribution: metadata.EntryPoints(
    point for point in every.fget(distribution) if not point.value.startswith("fabric_plugins")
))
sys.exit(pytest.main([*sys.argv[1:], "-q", "-x", "-p", "no:cacheprovider"]))
"""


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=pytest.mark.sampled(0.15))
        for file in sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/core/test_*.py"))
    ],
)
def test_core_passes_its_tests_without_any_plugin(file: str) -> None:
    """With ``fabric_plugins`` not importable and its entry points gone, the core's own tests pass."""
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, file], cwd=ROOT, capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


_BARE = """
import importlib.metadata as metadata

# As in a clone that was never installed: there is no metadata of any distribution.
metadata.distributions = lambda **given: iter(())
from fabric_core import Fabric
Fabric()
"""


def test_a_clone_that_was_never_installed_says_how_to_install_it() -> None:
    """``PYTHONPATH=. python -c "... Fabric()"`` in a bare clone ends with the command that installs it."""
    done = subprocess.run(
        [sys.executable, "-c", _BARE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "no distribution that provides plugins" in done.stderr
    assert "pip install -e ." in done.stderr
