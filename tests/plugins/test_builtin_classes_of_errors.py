"""Each error is also of the builtin class that Lightning Fabric raises at that place."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric
from fabric_core.errors import FabricError


def made(**arguments: Any) -> Fabric:
    """Give one on the CPU."""
    return Fabric(**{"accelerator": "cpu", "devices": 1, **arguments})


def _model(fabric: Fabric) -> tuple[Any, Any, Any]:
    bare = nn.Linear(2, 1)
    model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
    return bare, model, optimizer


def _data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(2, 1)))


def _no_parameter() -> None:
    pass


def _keyword(*, fabric: Any) -> None:
    pass


# What is done, and what Lightning Fabric raises then; read off its own `raise` statements, and tried.
CASES: dict[str, tuple[type[Exception], Callable[[Fabric, Path], Any]]] = {
    "a model again": (ValueError, lambda fabric, _: fabric.setup(_model(fabric)[1])),
    "a model again, alone": (ValueError, lambda fabric, _: fabric.setup_module(_model(fabric)[1])),
    "a bare model again": (ValueError, lambda fabric, _: fabric.setup(_model(fabric)[0])),
    "an optimizer again": (ValueError, lambda fabric, _: fabric.setup(nn.Linear(2, 1), _model(fabric)[2])),
    "an optimizer again, alone": (ValueError, lambda fabric, _: fabric.setup_optimizers(_model(fabric)[2])),
    "no optimizer": (ValueError, lambda fabric, _: fabric.setup_optimizers()),
    "no model": (TypeError, lambda fabric, _: fabric.setup("model")),  # type: ignore[call-overload]
    "no optimizer but a model": (TypeError, lambda fabric, _: fabric.setup_optimizers(nn.Linear(2, 1))),  # type: ignore[call-overload]
    "no loader": (ValueError, lambda fabric, _: fabric.setup_dataloaders()),
    "a loader again": (ValueError, lambda fabric, _: fabric.setup_dataloaders(fabric.setup_dataloaders(_data()))),
    "no loader but a number": (TypeError, lambda fabric, _: fabric.setup_dataloaders(3)),
    "no loader but text": (TypeError, lambda fabric, _: fabric.setup_dataloaders("data")),
    "no loader but a data set": (TypeError, lambda fabric, _: fabric.setup_dataloaders(_data().dataset)),
    "no loader but its class": (TypeError, lambda fabric, _: fabric.setup_dataloaders(DataLoader)),
    "no loader but a model": (TypeError, lambda fabric, _: fabric.setup_dataloaders(nn.ModuleList())),
    "no sync of a bare model": (TypeError, lambda fabric, _: fabric.no_backward_sync(nn.Linear(2, 1))),  # type: ignore[arg-type]
    "no sync of a number": (TypeError, lambda fabric, _: fabric.no_backward_sync(1, False)),  # type: ignore[arg-type]
    "clip by both": (ValueError, lambda fabric, _: fabric.clip_gradients(*_model(fabric)[1:], clip_val=1, max_norm=1)),
    "clip by none": (ValueError, lambda fabric, _: fabric.clip_gradients(*_model(fabric)[1:])),
    "mark no method": (TypeError, lambda fabric, _: _model(fabric)[1].mark_forward_method(1)),
    "mark forward": (ValueError, lambda fabric, _: _model(fabric)[1].mark_forward_method("forward")),
    "mark what is absent": (AttributeError, lambda fabric, _: _model(fabric)[1].mark_forward_method("absent")),
    "mark an attribute": (AttributeError, lambda fabric, _: _model(fabric)[1].mark_forward_method("in_features")),
    "a filter that is no dict": (TypeError, lambda fabric, path: fabric.save(path, {"a": {}}, filter=[1])),  # type: ignore[arg-type]
    "an empty filter that is no dict": (TypeError, lambda fabric, path: fabric.save(path, {"a": {}}, filter=[])),  # type: ignore[arg-type]
    "a filter for what is absent": (
        ValueError, lambda fabric, path: fabric.save(path, {"a": {}}, filter={"b": lambda _name, _value: True}),
    ),
    "a filter that can't be called": (
        TypeError, lambda fabric, path: fabric.save(path, {"a": {}}, filter={"a": 1}),  # type: ignore[dict-item]
    ),
    "no checkpoint": (FileNotFoundError, lambda fabric, path: fabric.load(path)),
    "no checkpoint, bare": (FileNotFoundError, lambda fabric, path: fabric.load_raw(path, nn.Linear(1, 1))),
    "a key that is missing": (
        KeyError, lambda fabric, path: (fabric.save(path, {"a": 1}), fabric.load(path, {"b": 2})),
    ),
    "names that are missing": (
        RuntimeError,
        lambda fabric, path: (
            fabric.save(path, {"m": nn.Linear(1, 1)}), fabric.load(path, {"m": nn.Linear(1, 1, bias=False)}),
        ),
    ),
    "launch of no function": (TypeError, lambda fabric, _: fabric.launch(3)),  # type: ignore[arg-type]
    "launch of a function without parameters": (TypeError, lambda fabric, _: fabric.launch(_no_parameter)),
    "launch of a function of keywords": (TypeError, lambda fabric, _: fabric.launch(_keyword)),
    "launch of nothing by spawning": (TypeError, lambda *_: made(strategy="ddp_spawn", devices=2).launch()),
    "a rank before launch": (RuntimeError, lambda *_: made(strategy="ddp", devices=2).global_rank),
    "setup before launch": (RuntimeError, lambda *_: made(strategy="ddp", devices=2).setup(nn.Linear(1, 1))),
    "a strategy that nobody knows": (ValueError, lambda *_: made(strategy="ddq")),
    "an accelerator that nobody knows": (ValueError, lambda *_: made(accelerator="cpx")),
    "a precision that nobody knows": (ValueError, lambda *_: made(precision="31-true")),
    "no nodes": (ValueError, lambda *_: made(num_nodes=0)),
    "devices that are no number": (TypeError, lambda *_: made(devices="many")),
    "no devices": (ValueError, lambda *_: made(devices=0)),
    "one process too many": (ValueError, lambda *_: made(strategy="single_device", devices=2)),
    "a seed below zero": (ValueError, lambda fabric, _: fabric.seed_everything(-1)),
    "a seed too large": (ValueError, lambda fabric, _: fabric.seed_everything(2**32)),
    "the logger where there is none": (IndexError, lambda fabric, _: fabric.logger),
    "several elements": (ValueError, lambda *_: made(loggers=_Taking()).log("a", torch.ones(2))),
    "a callback that can't be called": (TypeError, lambda *_: made(callbacks=[_Taking()]).call("number")),
}  # fmt: skip
_PLAIN = {
    "a callback that can't be called",
    "mark no method",
    "mark forward",
    "mark what is absent",
    "mark an attribute",
}
"""Raised as the builtin itself."""


class _Taking:
    number = 3

    def log_metrics(self, metrics: Any, step: Any) -> None:
        pass


@pytest.mark.parametrize("case", CASES)
def test_the_builtin_class_is_lightning_s(case: str, tmp_path: Path) -> None:
    """Scripts catch builtins, so each error is one, beside being ours."""
    builtin, act = CASES[case]
    with pytest.raises(builtin) as caught:
        act(made(), tmp_path / "checkpoint")
    assert case in _PLAIN or isinstance(caught.value, FabricError)


_OF_LIGHTNING = """
import sys
import lightning.fabric as there
from lightning.fabric import Fabric
sys.path[:0] = [{folder!r}]
import tempfile, pathlib
import test_builtin_classes_of_errors as ours

ours.Fabric = Fabric
left_out = {left_out!r}
for name, (builtin, act) in ours.CASES.items():
    if name in left_out:
        continue
    with tempfile.TemporaryDirectory() as folder:
        try:
            act(ours.made(), pathlib.Path(folder) / "checkpoint")
        except builtin:
            continue
        except Exception as error:
            print(f"{{name}}: {{type(error).__name__}}: {{error}}"[:150])
        else:
            print(f"{{name}}: nothing")
"""
_OURS_ALONE = {
    "a rank before launch": "it guesses one",
    "a bare model again": "it is set up twice, quietly",
    "no model": "an AttributeError of what it tries next",
    "no optimizer but a model": "an AttributeError of what it tries next",
    "an empty filter that is no dict": "an empty one is not looked at",
    "no devices": "a TypeError, which ours is too",
    "one process too many": "one process trains, quietly",
    "launch of a function of keywords": "it fails where it is called, in each process",
    "a callback that can't be called": "it warns",
}
"""Where Lightning raises another class, or nothing; and what it does."""


def test_lightning_raises_these_classes() -> None:
    """The table is what an installed Lightning does."""
    pytest.importorskip("lightning", reason="the extra bench is not installed")
    code = _OF_LIGHTNING.format(folder=str(Path(__file__).parent), left_out=sorted(_OURS_ALONE))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
