"""A rank that ended before it came is missed; another run's ranks are no witness, whatever their run is called."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows the variables of a process")

_ASK = """
import os, sys
from fabric_core.contracts import ProcessInfo
from fabric_plugins.launchers._reports import missing_ranks
os.environ.update(item.split("=") for item in sys.argv[1:])
print(missing_ranks(ProcessInfo(global_rank=1, local_rank=1, world_size=2, local_world_size=2)))
"""
_RUN = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1"}
_OURS, _THEIRS = {**_RUN, "MASTER_PORT": "1"}, {**_RUN, "MASTER_PORT": "2"}


@pytest.mark.parametrize(
    ("beside", "started_with", "set_later", "missing"),
    [
        pytest.param({**_OURS, "RANK": "0"}, {**_OURS, "RANK": "1"}, {}, [], id="both are here"),
        pytest.param({**_THEIRS, "RANK": "0"}, {**_OURS, "RANK": "1"}, {}, [0], id="rank 0 of another run"),
        pytest.param({**_OURS, "RANK": "1"}, {}, {**_OURS, "RANK": "1"}, [], id="variables set after the start"),
    ],
)
def test_ranks_that_are_missing(
    beside: dict[str, str], started_with: dict[str, str], set_later: dict[str, str], missing: list[int]
) -> None:
    """They are told from the processes' own variables, where this one's are such too."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "RANK"))}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={**clean, **beside}) as other:
        later = [f"{name}={value}" for name, value in set_later.items()]
        done = subprocess.run(
            [sys.executable, "-c", _ASK, *later],
            env={**clean, **started_with},
            capture_output=True,
            text=True,
            check=True,
        )
        other.communicate(b"\n")
    assert done.stdout.strip() == str(missing)
