"""The documentation's scripts, typed into a file and run as a reader runs them, on one process and on two.

A page's `python` blocks, one after the other, are a script. For two processes a reader changes what the README and the
tutorial say: ``devices=1`` of a ``Fabric`` becomes ``strategy="ddp", devices=2``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_pages import ROOT, read_blocks

pytestmark = pytest.mark.sampled(0.3)

TUTORIAL = ROOT / "docs" / "tutorials" / "first-training.md"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


def _script(page: Path, devices: int) -> str:
    text = page.read_text(encoding="utf-8")
    code = "".join(block.code for block in read_blocks(text, str(page)) if block.language == "python")
    return code if devices == 1 else "".join(map(_on_two, code.splitlines(keepends=True)))


def _on_two(line: str) -> str:
    asked = "devices=2" if "strategy=" in line else 'strategy="ddp", devices=2'
    return re.sub(r"(\bFabric\(.*)\bdevices=1\b", rf"\1{asked}", line)


PAGES = [ROOT / "README.md", TUTORIAL, *sorted(ROOT.glob("docs/how-to/*.md"))]
ALONE = {"log-metrics", "resume-exactly", "save-and-load"}
"""Pages whose scripts look at the files of one process; what they say of several is tested elsewhere."""
SCRIPTS = [
    (page, devices)
    for page in PAGES
    for devices in ((1,) if page.stem in ALONE else (1, 2))
    if f"devices={devices}" in _script(page, devices)
]


def _run(folder: Path, code: str, *launcher: str) -> str:
    (folder / "typed.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *launcher, "typed.py"],
        cwd=folder,
        # More threads would only wait for each other where other work runs beside the tests.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("page", "devices"), SCRIPTS, ids=[f"{page.stem}-{devices}" for page, devices in SCRIPTS])
def test_a_pages_script_runs_as_typed(page: Path, devices: int, tmp_path: Path) -> None:
    """It ends well on one process, and on two where a reader says so."""
    _run(tmp_path, _script(page, devices))


def test_the_tutorials_script_under_torchrun(tmp_path: Path) -> None:
    """What the tutorial says of torchrun holds: the same two processes, and one line per epoch."""
    code = _script(TUTORIAL, 2)
    assert 'Fabric(accelerator="cpu", strategy="ddp", devices=2)' in code, "the tutorial's own words"
    assert _run(tmp_path, code, *TORCHRUN).count("epoch 4  loss") == 1


def test_every_page_that_trains_is_run_on_two_processes() -> None:
    """The README, the tutorial and the how-to pages with ``fabric.setup`` all have a run on two processes."""
    trains = {page for page in PAGES if ".setup(" in _script(page, 1) and page.stem not in ALONE}
    assert trains <= {page for page, devices in SCRIPTS if devices == 2}
    assert {ROOT / "README.md", TUTORIAL} <= trains
    assert len(trains) >= 7
