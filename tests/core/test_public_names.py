"""The public surface is frozen: growing it is a decision."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fabric_core

_NAMES = [
    "Accelerator", "Checkpoint", "Fabric", "FabricDataLoader", "FabricModule", "FabricOptimizer", "Launcher", "Logger",
    "Precision", "Strategy", "Wrapper", "around", "hookimpl", "is_wrapped", "register", "seed_everything", "unwrap",
]  # fmt: skip

_METHODS = [
    "accelerator", "all_gather", "all_reduce", "autocast", "backward", "barrier", "broadcast", "call", "clip_gradients",
    "device", "global_rank", "init_module", "init_tensor", "is_global_zero", "join", "launch", "load", "load_raw",
    "local_rank", "log", "log_dict", "logger", "loggers", "no_backward_sync", "node_rank", "plan", "precision", "print",
    "random_state", "rank_zero_first", "run", "save", "seed_everything", "setup", "setup_dataloaders", "setup_module",
    "setup_optimizers", "should_stop", "strategy", "teardown", "to_device", "track", "world", "world_size",
]  # fmt: skip


def test_names_of_the_core() -> None:
    """``fabric_core`` offers these names, each of which can be had."""
    assert fabric_core.__all__ == _NAMES
    for name in _NAMES:
        assert getattr(fabric_core, name) is not None
        assert name in dir(fabric_core)
    with pytest.raises(AttributeError, match="no attribute 'Fabrik'"):
        fabric_core.Fabrik  # noqa: B018


def test_names_of_the_facade() -> None:
    """``Fabric`` has these public names, all with a docstring."""
    offered = sorted(name for name in dir(fabric_core.Fabric) if not name.startswith("_"))
    assert [name for name in _METHODS if name not in offered] == []
    for name in offered:
        assert inspect.getdoc(getattr(fabric_core.Fabric, name))


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "contracts",
        "kinds",
        "assembly",
        "binding",
        "wrapping",
        "choosing.candidates",
        "choosing.lock",
        "choosing.offers",
        "choosing.parsing",
        "choosing.plan",
        "choosing.registry",
        "choosing.request",
        "choosing.resolve",
        "choosing.suggest",
    ],
)
def test_all_is_true(module: str) -> None:
    """Every name in a module's ``__all__`` exists."""
    loaded = importlib.import_module(f"fabric_core.{module}")
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []


def test_importing_the_core_imports_next_to_nothing() -> None:
    """``import fabric_core`` brings neither torch nor pydantic; its parts come when they are used."""
    code = "import sys, fabric_core; print([m for m in ('torch', 'pydantic', 'pluggy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_answers_too_many_questions() -> None:
    """A file of the packages has at most 400 lines."""
    root = Path(__file__).parents[2]
    files = [file for package in ("fabric_core", "fabric_plugins") for file in (root / package).rglob("*.py")]
    lengths = {file.relative_to(root).as_posix(): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(lengths) > 100
    assert {file: length for file, length in lengths.items() if length > 400} == {}
