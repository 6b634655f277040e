"""The scripts of docs/examples run, small, on one process and on two, and say what they should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TWO = ("--strategy", "ddp", "--devices", "2")

FALLS = {
    "language_model": (("--steps", "30"), r"loss ([\d.]+)", 0.8),
    "gan": (("--steps", "101"), r": ([\d.]+) from", 0.8),
    "reinforcement": (("--steps", "60"), r"reward -([\d.]+)", 0.8),
    "meta_learning": (("--steps", "60"), r"loss ([\d.]+)", 0.8),
    "meta_fsdp": (("--steps", "30"), r"loss ([\d.]+)", 0.8),
    "tensor_parallel": (("--steps", "30"), r"loss ([\d.]+)", 0.8),
}
"""What a script is run with, what it says how far it is by, and what part of the first number the last is at most."""

ALONE = {"meta_fsdp", "tensor_parallel"}
"""Scripts that choose their strategy themselves."""


def _run(name: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    """A script that is added is tried, too; digits.py has tests of its own, and my_models.py is run by its page."""
    tried = {*FALLS, "digits", "my_models", "k_fold", "inference", "exact_evaluation", "resume"}
    assert {one.stem for one in EXAMPLES.glob("*.py")} == tried


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize("name", FALLS)
def test_it_learns(name: str, tmp_path: Path) -> None:
    """On two processes."""
    arguments, said, part = FALLS[name]
    printed = _run(name, tmp_path, *arguments, *(("--devices", "2") if name in ALONE else TWO))
    numbers = [float(one) for one in re.findall(said, printed)]
    assert numbers[-1] < part * numbers[0], printed


@pytest.mark.sampled(0.2)
def test_folds_are_judged(tmp_path: Path) -> None:
    """Each fold has a line, and all together are right more often than chance."""
    printed = _run("k_fold", tmp_path, "--epochs", "8", *TWO)
    assert printed.count("fold") == 3
    assert float(re.findall(r"mean: ([\d.]+)", printed)[0]) > 0.6


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_marked_method_counts(strategy: str, tmp_path: Path) -> None:
    """Also with parameters in shards."""
    printed = _run("inference", tmp_path, "--strategy", strategy, "--devices", "2")
    assert "said: 0 1 2 3 4 5 6 7 8 9" in printed


@pytest.mark.sampled(0.2)
def test_an_evaluation_says_the_same_on_two_processes(tmp_path: Path) -> None:
    """Every sample counts once."""
    alone = _run("exact_evaluation", tmp_path)
    assert "101 samples" in alone
    assert _run("exact_evaluation", tmp_path, *TWO) == alone


@pytest.mark.sampled(0.2)
def test_learning_to_learn_is_the_same_on_two_processes(tmp_path: Path) -> None:
    """Gradients that the script averages by itself make the steps of one process that has all tasks."""
    assert _run("meta_learning", tmp_path, "--steps", "21", *TWO) == _run("meta_learning", tmp_path, "--steps", "21")


@pytest.mark.sampled(0.2)
def test_a_training_that_was_stopped_ends_where_another_does(tmp_path: Path) -> None:
    """Bit for bit, in the middle of an epoch."""
    straight = _run("resume", tmp_path, "--folder", "none", *TWO)
    assert _run("resume", tmp_path, "--stop", "8", *TWO) == ""
    assert _run("resume", tmp_path, *TWO) == straight
    assert "after 20 steps" in straight


@pytest.mark.authors
def test_the_notebook_runs(tmp_path: Path) -> None:
    """In a kernel of its own, whole."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    book = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(book, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "from" in str(book.cells[-1].outputs)
