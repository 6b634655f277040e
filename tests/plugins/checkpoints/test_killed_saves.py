"""Killed at any moment of saving, what was complete stays loadable, and nothing stays beside it for good."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("CHECKPOINT_KILLS", "12"))
"""How many for all cases together; ``CHECKPOINT_KILLS=200`` is the full number."""


SHARE = {("single_file", 1): 4, ("safetensors", 1): 8, ("distributed", 1): 4, ("distributed", 2): 2}
"""Formats and ranks, and which part of the kills is theirs."""


@pytest.mark.parametrize(("form", "ranks"), SHARE)
def test_what_was_complete_stays(form: str, ranks: int, tmp_path: Path) -> None:
    """With and without an exchange of names, to new and to existing paths, one rank of one or of two is killed.

    What a load gives is the last save that returned, or the one that was under way, whole.
    """
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(max(2, KILLS // SHARE[form, ranks])), form, str(ranks)],
        capture_output=True, text=True, timeout=100 + KILLS * 3, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) >= 2
    for kill in kills:
        last = kill["told"]
        right = {last, last + 1} if last >= 0 else {1}
        assert kill["got"] in right or (last < 0 and str(kill["got"]).startswith("NoCheckpointError")), kill
        assert kill["beside"] == [], kill
