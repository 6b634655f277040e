"""The site of the documentation is built without a warning, and can be searched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.authors
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Every page becomes one, the search knows them, and signatures come from the code."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [page.relative_to(ROOT / "docs") for page in ROOT.glob("docs/**/*.md")]
    missing = [
        str(page)
        for page in pages
        if not (
            tmp_path / "site" / page.parent / ("index.html" if page.name == "README.md" else f"{page.stem}.html")
        ).exists()
    ]
    assert not missing
    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any("write-a-strategy" in entry["location"] for entry in index["docs"])
    assert "no_backward_sync" in (tmp_path / "site" / "reference" / "python.html").read_text(encoding="utf-8")
