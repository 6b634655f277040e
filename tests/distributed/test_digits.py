"""docs/examples/digits.py as a user runs it: the same accuracy, however it is run."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fabric_core import Fabric

pytestmark = pytest.mark.sampled(0.4)

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "digits.py"
EPOCHS = 6
ACCURACY = re.compile(r"^test accuracy ([\d.]+)%, and again ([\d.]+)%", re.MULTILINE)

PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def run(command: list[str], out: Path) -> tuple[float, str]:
    """Run the script; return the test accuracy in percent and what was printed."""
    result = subprocess.run(
        [*command, "--accelerator", "cpu", "--epochs", str(EPOCHS), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        # More threads would only wait for each other where other work runs beside the tests.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    found = ACCURACY.findall(result.stdout)
    assert len(found) == 1, f"one process speaks for all; got:\n{result.stdout}"
    [(trained, reloaded)] = found
    assert trained == reloaded
    return float(trained), result.stdout


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, Path]:
    """The accuracy of one process, and the folder that it wrote to."""
    out = tmp_path_factory.mktemp("single")
    accuracy, _ = run([*PYTHON, str(SCRIPT), "--strategy", "single_device"], out)
    return accuracy, out


def test_one_process_learns_the_digits(single: tuple[float, Path]) -> None:
    """One process recognises at least 97 % of the test images."""
    accuracy, _ = single
    assert accuracy >= 97


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        (PYTHON, []),
        (PYTHON, ["--precision", "bf16-mixed"]),
        (TORCHRUN, []),
    ],
    ids=["ddp", "ddp-bf16-mixed", "torchrun"],
)
def test_two_processes_learn_as_well_as_one(
    launcher: list[str], options: list[str], single: tuple[float, Path], tmp_path: Path
) -> None:
    """Two processes, in either precision and however started, come within one point of one process.

    What they saved, one process reads.
    """
    command = [*launcher, str(SCRIPT), "--strategy", "ddp", "--devices", "2", *options]
    accuracy, printed = run(command, tmp_path)
    assert accuracy >= 97
    assert abs(accuracy - single[0]) <= 1
    assert re.search(r"^strategy +ddp ", printed, re.MULTILINE), "the plan is shown"
    assert Fabric(accelerator="cpu", devices=1).load(tmp_path / "digits.ckpt")["epoch"] == EPOCHS
    assert len(re.findall(r"^epoch +\d+/", printed, re.MULTILINE)) == EPOCHS


def test_what_the_script_writes(single: tuple[float, Path]) -> None:
    """The metrics have a line per epoch, the picture is one, and plain PyTorch reads the model."""
    accuracy, out = single
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert f"{float(rows[-1]['test_accuracy']):.2%}" == f"{accuracy:.2f}%"
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = torch.load(out / "digits.ckpt", weights_only=True)
    assert checkpoint["epoch"] == EPOCHS
    assert checkpoint["model"]["0.weight"].shape == (32, 1, 3, 3)
    assert sorted(path.name for path in out.iterdir()) == ["digits.ckpt", "digits.png", "metrics.csv"]
