"""An editable install is a path that type checkers follow, as they follow an installed wheel."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "fabric_core", "fabric_plugins")

_SCRIPT = """
from fabric_core import Fabric
from fabric_plugins.strategies import DDPStrategy

fabric = Fabric(accelerator="cpu", devices=1)
reveal_type(fabric.world_size)
reveal_type(DDPStrategy().options)
fabric.lauch()
"""

_CONFIG = """
[mypy]
strict = true
[mypy-torch.*,pydantic.*,pluggy.*,numpy.*]
follow_imports = skip
"""


def test_a_type_checker_sees_the_types_of_an_editable_install(
    make_environment: Callable[[str], Any], tmp_path: Path
) -> None:
    """mypy, pointed at the environment, knows the types of a user's script and finds its typo."""
    pytest.importorskip("mypy", reason="the extra dev brings mypy")
    project = tmp_path / "project"
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            project.mkdir(exist_ok=True)
            shutil.copy(source, project / name)
    environment = make_environment("editable")
    environment.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", str(project))
    # What the tests' own environment has built it, and would be found as well.
    (environment.python.parents[1] / f"lib/python3.{sys.version_info.minor}/site-packages/shared.pth").unlink()
    (environment.folder / "script.py").write_text(_SCRIPT, encoding="utf-8")
    (environment.folder / "mypy.ini").write_text(_CONFIG, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", str(environment.python), "script.py"],
        cwd=environment.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert 'Revealed type is "int"' in done.stdout, done.stdout + done.stderr
    assert "DDPOptions" in done.stdout
    assert 'script.py:8: error: "Fabric" has no attribute "lauch"' in done.stdout
    assert "Found 1 error in 1 file" in done.stdout, done.stdout
