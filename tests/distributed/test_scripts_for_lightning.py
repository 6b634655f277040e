"""Programs in Lightning's style run here by changing their imports, with the same losses."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sampled(0.35)

SCRIPTS = Path(__file__).parents[1] / "scripts"
INSTALLED = importlib.util.find_spec("lightning") is not None


def _said(script: str, devices: int, folder: Path, library: str) -> list[str]:
    environment = {**os.environ, "LIBRARY": library, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, script, str(folder), str(devices)],
        cwd=SCRIPTS, env=environment, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("script", ["gpt.py", "gan.py", "trainer.py"])
def test_a_script_runs_by_switching_one_import(script: str, devices: int, tmp_path: Path) -> None:
    """It says the same, loss by loss, on both libraries; where Lightning is not installed, it runs and learns."""
    ours = _said(script, devices, tmp_path / "ours", "ours")
    assert sum("loss" in line for line in ours) > 2
    if INSTALLED:
        assert ours == _said(script, devices, tmp_path / "theirs", "lightning")
