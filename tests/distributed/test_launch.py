"""``fabric.launch()`` in real scripts: ranks are started, joined, and ended."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_core import Fabric
from fabric_core.choosing.registry import registered
from fabric_core.errors import LaunchError, MisuseError, RankFailedError
from fabric_plugins.strategies import DDPStrategy

pytestmark = pytest.mark.sampled(0.3)

_SCRIPT = """
import json, os, sys, torch
from fabric_core import Fabric

fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
fabric.launch()
total = fabric.all_reduce(torch.tensor(float(fabric.global_rank + 1)), reduce_op="sum")
word = fabric.broadcast("from rank 1" if fabric.global_rank == 1 else None, src=1)
row = {
    "rank": fabric.global_rank, "local": fabric.local_rank, "node": fabric.node_rank, "world": fabric.world_size,
    "total": total.item(), "word": word, "argv": sys.argv[1:], "dev": sys.flags.dev_mode, "pid": os.getpid(),
    "device": str(fabric.device),
}
print(json.dumps(row) + "\\n", end="", flush=True)
fabric.barrier()
fabric.teardown()
"""


def _run(
    *command: str, cwd: Path | None = None, stdin: str | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)


def _rows(output: str) -> list[dict[str, Any]]:
    return sorted(
        (json.loads(line) for line in output.splitlines() if line.startswith("{")), key=lambda row: row["rank"]
    )


def _script(folder: Path, text: str, name: str = "job.py") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


def _gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def _check_two_ranks(done: subprocess.CompletedProcess[str], argv: list[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    rows = _rows(done.stdout)
    assert [row["rank"] for row in rows] == [0, 1]
    assert {row["pid"] for row in rows}.__len__() == 2
    for row in rows:
        assert (row["local"], row["node"], row["world"]) == (row["rank"], 0, 2)
        assert (row["total"], row["word"], row["device"]) == (3.0, "from rank 1", "cpu")
        assert row["argv"] == argv
    return rows


@pytest.mark.slow
def test_plain_script_becomes_its_own_launcher(tmp_path: Path) -> None:
    """Each rank re-runs the command that was typed, with its arguments and interpreter flags."""
    done = _run(sys.executable, "-X", "dev", "-W", "ignore", _script(tmp_path, _SCRIPT), "--lr", "0.1 0.2")
    rows = _check_two_ranks(done, ["--lr", "0.1 0.2"])
    assert all(row["dev"] for row in rows)


@pytest.mark.slow
def test_script_that_left_its_folder_is_found_again(tmp_path: Path) -> None:
    """A script typed with a relative path may change the folder before it launches, and does so in each rank."""
    (tmp_path / "runs").mkdir()
    _script(tmp_path, "import os\nos.chdir('runs')\n" + _SCRIPT.replace("os.getpid()", "os.getcwd()"))
    done = _run(sys.executable, "job.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["pid"] for row in _rows(done.stdout)] == [str(tmp_path / "runs")] * 2


def test_module_is_run_again_as_a_module(tmp_path: Path) -> None:
    """``python -m package.job`` starts ranks with ``-m`` too, so relative imports work."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("")
    _script(package, "from . import helper\n" + _SCRIPT)
    _check_two_ranks(_run(sys.executable, "-m", "package.job", "x", cwd=tmp_path), ["x"])


@pytest.mark.slow
def test_debugger_starts_in_every_rank(tmp_path: Path) -> None:
    """``python -m pdb -c continue`` debugs every rank."""
    script = _script(tmp_path, _SCRIPT)
    done = _run(sys.executable, "-m", "pdb", "-c", "continue", script, stdin="q\n" * 3)
    assert [row["rank"] for row in _rows(done.stdout.replace("(Pdb) ", ""))] == [0, 1], done.stderr


@pytest.mark.slow
def test_torchrun_is_joined(tmp_path: Path) -> None:
    """Started by ``torchrun``, the process joins, and starts nothing."""
    script = _script(tmp_path, _SCRIPT)
    done = _run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    _check_two_ranks(done, [])


@pytest.mark.slow
def test_torchrun_with_other_devices_is_an_error(tmp_path: Path) -> None:
    """``torchrun`` with another number of processes than the code asks for is an error that says what to write."""
    script = _script(tmp_path, _SCRIPT)
    done = _run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", script)
    assert done.returncode != 0
    assert "started 3 processes" in done.stderr
    assert "devices=3" in done.stderr


def test_script_from_standard_input_is_refused() -> None:
    """A command that can't be run again is an error that says what to do."""
    done = _run(sys.executable, "-", stdin=_SCRIPT)
    assert done.returncode == 1
    assert "can't be run again" in done.stderr
    assert "fabric.launch(function)" in done.stderr


@pytest.mark.slow
def test_exit_code_of_the_ranks_is_the_command_s(tmp_path: Path) -> None:
    """``sys.exit(7)`` on a rank ends the command with 7."""
    script = _script(
        tmp_path,
        """
        import sys
        from fabric_core import Fabric
        fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
        fabric.launch()
        sys.exit(7 if fabric.global_rank == 1 else 0)
        """,
    )
    done = _run(sys.executable, script)
    assert done.returncode == 7, done.stderr
    assert "rank 1 failed first, with exit code 7" in done.stderr


_FAILING = """
import os, sys, time, torch
from fabric_core import Fabric
from pathlib import Path

fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
fabric.launch()
Path(sys.argv[1], f"pid-{fabric.global_rank}").write_text(str(os.getpid()))
fabric.barrier()
if fabric.global_rank == 1:
    raise ValueError("the first cause")
fabric.all_reduce(torch.ones(1))
time.sleep(600)
"""


@pytest.mark.slow
def test_failing_rank_ends_all_and_speaks_first(tmp_path: Path) -> None:
    """One rank's failure ends the command within seconds, its traceback comes first, and no process is left."""
    start = time.monotonic()
    done = _run(sys.executable, _script(tmp_path, _FAILING), str(tmp_path), timeout=45)
    assert time.monotonic() - start < 30
    assert done.returncode == 1
    first = done.stderr.index("Traceback (most recent call last)")
    assert done.stderr[first:].partition("ValueError: the first cause")[0].count("rank 0") == 0, done.stderr
    assert done.stderr.index("the first cause") < done.stderr.index("rank 1 failed first")
    assert done.stderr.count("Traceback (most recent call last)") == 1
    for rank in range(2):
        assert _gone(int((tmp_path / f"pid-{rank}").read_text()))


_UNDER_WAY = """
import sys, torch
import torch.distributed as dist
from torch import nn
from fabric_core import Fabric


def work(fabric):
    global model  # it owns the process group too, until the interpreter's end
    if sys.argv[3] == "model":
        model = fabric.setup(nn.Linear(4, 4))
        fabric.backward(model(torch.ones(2, 4)).sum())
    if fabric.global_rank == 1:
        handle = dist.all_reduce(torch.ones(3), async_op=True)
        raise ValueError("the first cause")
    dist.recv(torch.ones(2), 1)


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", strategy=sys.argv[2], devices=2)
    if sys.argv[1] == "plain":
        fabric.launch()
        work(fabric)
    elif sys.argv[1] == "with":
        with fabric:
            fabric.launch()
            work(fabric)
    else:
        fabric.launch(work)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain ddp model", "with ddp nothing", "with ddp model", "function ddp model"])
def test_rank_fails_while_a_collective_is_under_way(tmp_path: Path, how: str) -> None:
    """It ends, though gloo would wait for the others to end the collective first, and they wait for this rank."""
    done = _run(sys.executable, _script(tmp_path, _UNDER_WAY), *how.split(), timeout=45)
    assert done.returncode == 1, done.stderr
    assert "the first cause" in done.stderr
    assert "rank 1 failed first, with exit code 1" in done.stderr


_ENDING_AT_ONCE = """
import sys, torch
from fabric_core import Fabric

sys.setswitchinterval(100)  # who has the interpreter keeps it
fabric = Fabric(accelerator="cpu", strategy="ddp", devices=6)
fabric.launch()
results = [fabric.all_reduce(torch.ones(1000)) for _ in range(8)]
if len(sys.argv) > 1:
    fabric.teardown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("last", [[], ["teardown"]])
def test_script_may_end_right_after_a_collective(tmp_path: Path, last: list[str]) -> None:
    """Gloo's threads let go of the tensors before the interpreter ends, or they would abort it."""
    done = _run(sys.executable, _script(tmp_path, _ENDING_AT_ONCE), *last, timeout=110)
    # On a busy machine PyTorch's agent warns that a look into its store found nothing in no time.
    said = [line for line in done.stderr.splitlines() if "waitForInput" not in line]
    assert (done.returncode, said) == (0, [])


_SLEEPING = """
import os, sys, time
from fabric_core import Fabric
from pathlib import Path

fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
fabric.launch()
path = Path(sys.argv[1], f"pid-{fabric.global_rank}")
path.with_suffix(".part").write_text(str(os.getpid()))
path.with_suffix(".part").rename(path)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_do_not_outlive_the_command(tmp_path: Path, how: signal.Signals) -> None:
    """Ending the command that was typed ends its ranks, even where it could not say goodbye."""
    with subprocess.Popen(
        [sys.executable, _script(tmp_path, _SLEEPING), str(tmp_path)],
        env={**os.environ, "TMPDIR": str(tmp_path)},  # what a killed process could not remove goes with the test
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 40
        files = [tmp_path / f"pid-{rank}" for rank in range(2)]
        while not all(file.exists() for file in files) and time.monotonic() < deadline:
            time.sleep(0.05)
        pids = [int(file.read_text()) for file in files]
        process.send_signal(how)
        assert process.wait(20) != 0
    deadline = time.monotonic() + 15
    while not all(_gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(_gone(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells that a parent has ended")
def test_rank_whose_agent_was_killed_early_ends(tmp_path: Path) -> None:
    """It could not ask yet to be ended with its agent, and doesn't wait for the others until the timeout."""
    with subprocess.Popen([sys.executable, "-c", ""]) as agent:
        agent.wait()
    place = {"RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "fabric-x"}
    told = {"TORCHELASTIC_FABRIC_REPORT": f"command:{agent.pid}:{tmp_path / 'failure.json'}"}
    done = subprocess.run(
        [sys.executable, _script(tmp_path, _SCRIPT)],
        env={**os.environ, **place, **meeting, **told},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, b"")


def _large(fabric: Fabric, megabytes: int) -> torch.Tensor:
    return torch.full((megabytes, 2**18), float(fabric.world_size))


class Patient(DDPStrategy):
    """A strategy that only this module knows."""


class Trainer(Fabric):
    """A subclass with a setting of its own."""

    lr = 0.0


def _settings(fabric: Trainer) -> tuple[str, str, float]:
    return type(fabric).__name__, type(fabric.strategy).__name__, fabric.lr


@pytest.mark.slow
def test_registrations_and_subclass_attributes_travel() -> None:
    """In a rank a plugin registered in this process is found, and a subclass has its attributes."""
    with registered("strategy", "patient", Patient):
        trainer = Trainer(accelerator="cpu", strategy="patient", devices=2)
        trainer.lr = 0.25
        assert trainer.launch(_settings) == ("Trainer", "Patient", 0.25)


def _fail_on_one(fabric: Fabric) -> None:
    if fabric.global_rank == 1:
        raise KeyError("only on rank 1")


@pytest.mark.slow
def test_function_returns_the_result_of_rank_zero_however_large() -> None:
    """A result larger than any pipe comes back; environment, signal handlers and PyTorch's logs stay as they were."""
    logger = logging.getLogger("torch.multiprocessing.spawn")  # which is silent meanwhile
    before = dict(os.environ), signal.getsignal(signal.SIGTERM), logger.level
    fabric = Fabric(accelerator="cpu", strategy="ddp:start_method=forkserver", devices=2)
    result = fabric.launch(_large, megabytes=64)
    assert result.shape == (64, 2**18)
    assert (result == 2).all()
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM), logger.level) == before


@pytest.mark.slow
def test_fork_server_starts_ranks_of_each_launch() -> None:
    """It imports what ranks need once; a later launch has its own report of failures; the list of the user is kept."""
    multiprocessing.set_forkserver_preload(["json"])
    try:
        fabric = Fabric(accelerator="cpu", strategy="ddp:start_method=forkserver", devices=2)
        assert fabric.launch(_large, megabytes=1).shape == (1, 2**18)
        with pytest.raises(RankFailedError) as caught:
            fabric.launch(_fail_on_one)
        assert (caught.value.rank, caught.value.exception_type) == (1, "KeyError")
        assert forkserver._forkserver._preload_modules == ["json"]  # type: ignore[attr-defined]
    finally:
        multiprocessing.set_forkserver_preload(["__main__"])


@pytest.mark.slow
def test_function_that_fails_on_a_rank_raises_here(capfd: pytest.CaptureFixture[str]) -> None:
    """The error names the rank and its exception, has the rank's traceback as its cause, and nothing else shows it."""
    with pytest.raises(RankFailedError, match="rank 1 failed first") as caught:
        Fabric(accelerator="cpu", strategy="ddp", devices=2).launch(_fail_on_one)
    error = caught.value
    assert (error.rank, error.exception_type, error.exception_message) == (1, "KeyError", "'only on rank 1'")
    assert "KeyError: 'only on rank 1'" in str(error)
    assert "in _fail_on_one" in str(error.__cause__)
    assert "Traceback" not in capfd.readouterr().err


def test_one_device_starts_no_process() -> None:
    """With one device the function runs here."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        assert fabric.launch(lambda fabric, more: (os.getpid(), fabric.world_size, more), more="x") == (
            os.getpid(),
            1,
            "x",
        )
        assert fabric.launch() is None


def test_several_nodes_need_a_launcher_on_each() -> None:
    """Two nodes can't be started from one; the error gives the command."""
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2, num_nodes=2)
    with pytest.raises(LaunchError, match="torchrun --nnodes 2 --nproc-per-node 2"):
        fabric.launch()


def test_use_before_launch_says_so() -> None:
    """A collective before ``launch`` is an error that names it."""
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    with pytest.raises(MisuseError, match=r"fabric\.launch\(\)"):
        fabric.all_reduce(torch.ones(1))
