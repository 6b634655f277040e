"""Killed at any moment of saving, what was complete stays loadable, and nothing stays beside it for good."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("CHECKPOINT_KILLS", "12"))
"""How many for all cases together; ``CHECKPOINT_KILLS=200`` is the full number."""


@pytest.mark.parametrize(
    ("form", "ranks", "part"), [("single_file", 1, 4), ("distributed", 1, 4), ("distributed", 2, 2)]
)
def test_what_was_complete_stays(form: str, ranks: int, part: int, tmp_path: Path) -> None:
    """With and without an exchange of names, to new and to existing paths, one rank of one or of two is killed."""
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(max(2, KILLS // part)), form, str(ranks)],
        capture_output=True, text=True, timeout=100 + KILLS * 3, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) >= 2
    for kill in kills:
        if kill["complete"] or not str(kill["got"]).startswith("NoCheckpointError"):
            assert isinstance(kill["got"], int), kill
        assert kill["beside"] == [], kill
