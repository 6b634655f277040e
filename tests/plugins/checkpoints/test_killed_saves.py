"""Killed at any moment of saving, what was complete stays loadable, and nothing stays beside it for good."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 5
"""How many in a batch."""
BATCHES = {
    ("single_file", 1): 5,
    ("single_file", 2): 8,
    ("safetensors", 1): 3,
    ("safetensors", 2): 2,
    ("distributed", 1): 7,
    ("distributed", 2): 15,
}
"""Formats and ranks, and how many batches of each: 200 kills."""


@pytest.mark.sampled(0.05)
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("form", "ranks", "batch"), [(*case, batch) for case, count in BATCHES.items() for batch in range(count)]
)
def test_what_was_complete_stays(form: str, ranks: int, batch: int, tmp_path: Path) -> None:
    """With and without an exchange of names, to new and to existing paths, one rank of one or of two is killed.

    What a load gives is the last save that returned, or the one that was under way, whole.
    """
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(KILLS), form, str(ranks)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == KILLS
    for kill in kills:
        last = kill["told"]
        right = {last, last + 1} if last >= 0 else {1}
        assert kill["got"] in right or (last < 0 and str(kill["got"]).startswith("NoCheckpointError")), kill
        assert kill["beside"] == [], kill
