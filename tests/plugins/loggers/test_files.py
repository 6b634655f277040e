"""The loggers that write files: what is logged is found again, whatever happens."""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import RequestError
from fabric_plugins.loggers import CSVLogger, JSONLLogger, TensorBoardLogger

CLASSES: list[Any] = [CSVLogger, JSONLLogger, TensorBoardLogger]


def rows(folder: str | Path) -> list[dict[str, float]]:
    """Read what a logger wrote: for each step, the numbers under their names."""
    folder = Path(folder)
    if (folder / "metrics.csv").exists():
        parts = sorted(folder.glob("metrics*.csv"))
        found = [row for part in parts for row in csv.DictReader(part.read_text().splitlines())]
        return [{name: float(value) for name, value in row.items() if value} for row in found]
    if (folder / "metrics.jsonl").exists():
        loaded = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: float(value) for name, value in row.items() if name != "time"} for row in loaded]
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    steps: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    steps.setdefault(event.step, {"step": event.step})[value.tag] = value.tensor.float_val[0]
    return list(steps.values())


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_logged_is_found(cls: Any, tmp_path: Path) -> None:
    """Numbers, tensors of one element and NumPy's scalars come back, under their steps, with new names in between."""
    logger = cls(tmp_path, name="run")
    fabric = Fabric(accelerator="cpu", devices=1, loggers=logger)
    assert fabric.logger is logger
    fabric.log("loss", torch.full((1, 1), 0.5, requires_grad=True))
    fabric.log_dict({"accuracy": np.float32(0.25), "loss": 1}, step=5)
    fabric.log("rate", np.array([0.125]), step=6)
    fabric.log("loss", torch.tensor(3), step=7)
    fabric.teardown()
    assert rows(logger.log_dir) == [
        {"step": 0, "loss": 0.5},
        {"step": 5, "accuracy": 0.25, "loss": 1},
        {"step": 6, "rate": 0.125},
        {"step": 7, "loss": 3},
    ]


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(0), np.ones((2, 1))])
def test_several_elements_are_an_error(value: Any, tmp_path: Path) -> None:
    """What is no one number says so, and names the metric."""
    fabric = Fabric(accelerator="cpu", devices=1, loggers=CSVLogger(tmp_path))
    with pytest.raises(RequestError, match="'loss' is not one number") as error:
        fabric.log("loss", value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("cls", CLASSES)
def test_attributes_are_lightning_s(cls: Any, tmp_path: Path) -> None:
    """Name, version and folder follow Lightning's rules; a version that is there is followed by the next."""
    first = cls(tmp_path, "run")
    assert (first.name, first.version, first.root_dir) == ("run", 0, str(tmp_path))
    assert first.log_dir == str(tmp_path / "run" / "version_0")
    assert not Path(first.log_dir).exists()
    first.log_metrics({"a": 1.0})
    first.log_metrics({"a": 2.0}, 4)
    assert cls(tmp_path, "run").version == 1
    assert first.version == 0
    (tmp_path / "run" / "version_7").mkdir()
    assert cls(tmp_path, "run").version == 8
    assert cls(tmp_path).log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert cls(tmp_path, name=None, version="mine").log_dir == str(tmp_path / "mine")
    assert cls(tmp_path, name="x", version=3).log_dir == str(tmp_path / "x" / "version_3")
    first.save()
    first.finalize("success")
    assert rows(first.log_dir) == [{"step": 0, "a": 1}, {"step": 4, "a": 2}]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_prefix_goes_before_each_name(cls: Any, tmp_path: Path) -> None:
    """With a dash, as in Lightning."""
    logger = cls(tmp_path, prefix="val")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert rows(logger.log_dir) == [{"step": 0, "val-loss": 1}]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_version_that_is_named_is_continued(cls: Any, tmp_path: Path) -> None:
    """Nothing of an earlier run is lost, also where the names differ."""
    for step, name in enumerate(["loss", "loss", "other", "loss"]):
        logger = cls(tmp_path, version="mine")
        logger.log_metrics({name: 0.5}, step)
        logger.finalize("success")
    expected = [{"step": step, name: 0.5} for step, name in enumerate(["loss", "loss", "other", "loss"])]
    assert sorted(rows(logger.log_dir), key=lambda row: row["step"]) == expected


@pytest.mark.parametrize("cls", CLASSES)
def test_settings_are_written(cls: Any, tmp_path: Path) -> None:
    """Mappings and parsers' namespaces alike, later ones beside earlier ones."""
    logger = cls(tmp_path)
    logger.log_hyperparams({"rate": 0.5, "nested": {"layers": [1, 2], "none": None}, "bad": float("inf")})
    logger.log_hyperparams(argparse.Namespace(more=torch.float32))
    logger.finalize("success")
    written = json.loads((Path(logger.log_dir) / "hparams.json").read_text())
    assert written == {
        "rate": 0.5, "nested": {"layers": [1, 2], "none": None}, "bad": "Infinity", "more": "torch.float32",
    }  # fmt: skip


def test_rows_stay_as_they_were_written(tmp_path: Path) -> None:
    """A new name begins another part, and every earlier byte stays; at the end there is one file with every column."""
    logger = CSVLogger(tmp_path)
    first = Path(logger.log_dir) / "metrics.csv"
    logger.log_metrics({"loss": 1.0}, 0)
    before, inode = first.read_bytes(), first.stat().st_ino
    logger.log_metrics({"loss": 2.0, 'odd "name", here': 3.0}, 1)
    logger.log_metrics({"accuracy": 0.5}, 2)
    logger.log_metrics({"loss": 4.0}, 3)
    assert (first.read_bytes(), first.stat().st_ino) == (before, inode)
    parts = sorted(first.parent.iterdir())
    assert [part.name for part in parts] == ["metrics.csv", "metrics_1.csv", "metrics_2.csv"]
    for part in parts:
        lines = list(csv.reader(part.read_text().splitlines()))
        assert {len(line) for line in lines} == {len(lines[0])}
    logger.save()
    assert list(first.parent.iterdir()) == [first]
    with first.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["step", "loss", 'odd "name", here', "accuracy"],
            ["0", "1.0", "", ""], ["1", "2.0", "3.0", ""], ["2", "", "", "0.5"], ["3", "4.0", "", ""],
        ]  # fmt: skip
    logger.log_metrics({"accuracy": 0.75}, 4)
    logger.finalize("success")
    assert rows(first.parent)[-1] == {"step": 4, "accuracy": 0.75}


@pytest.mark.parametrize("cls", [CSVLogger, JSONLLogger])
def test_rows_are_brought_to_the_disk_every_few_steps(
    cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After as many as the option says, counted from the last time; and at once by ``save`` and at the end."""
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    logger = cls(tmp_path, flush_logs_every_n_steps=3)
    logger.log_metrics({"loss": 0.5}, 0)
    counts = []
    for rows_until_save in (5, 2, 4):
        logger.save()
        for step in range(rows_until_save):
            before = len(flushed)
            logger.log_metrics({"loss": 0.5}, step)
            counts.append(len(flushed) - before)
    assert counts == [0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    assert len(flushed) == 5
    logger.finalize("success")
    assert len(flushed) == 6


_ENDLESS = """
import itertools, sys
from fabric_core import Fabric

fabric = Fabric(accelerator="cpu", devices=1, loggers={"name": sys.argv[1], "options": {"root_dir": sys.argv[2]}})
for step in itertools.count():
    fabric.log_dict({"loss": step / 2, **({"late": 1.0} if step > 300 else {})}, step)
    print(step, flush=True)
"""


@pytest.mark.parametrize("name", ["csv", "jsonl", "tensorboard"])
def test_a_killed_run_keeps_its_rows(name: str, tmp_path: Path) -> None:
    """After ``kill -9`` every row is there but the one being written, the file parses, and the next run is the next."""
    with subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, name, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 600:
                os.kill(process.pid, signal.SIGKILL)
                break
        last = max([600, *map(int, process.stdout.read().split())])
    found = rows(tmp_path / "lightning_logs" / "version_0")
    assert [row["step"] for row in found] in ([*range(last + 1)], [*range(last + 2)])
    assert all(row["loss"] == row["step"] / 2 for row in found)
    assert "late" in found[-1]
    assert CSVLogger(tmp_path).version == 1


_SCRIPT = """
import sys
from fabric_core import Fabric

class Own:
    def log_metrics(self, metrics, step):
        print(f"metrics {metrics} {step} of rank {fabric.global_rank}", flush=True)

    def finalize(self, status):
        print(status, "of rank", fabric.global_rank, flush=True)

fabric = Fabric(accelerator="cpu", devices=int(sys.argv[2]), loggers=Own())
fabric.launch()
fabric.log("loss", 1)
fabric.barrier()
if sys.argv[1] == "raise":
    if fabric.is_global_zero:
        raise KeyError("on purpose")
    fabric.barrier()
if sys.argv[1] == "teardown":
    fabric.teardown()
"""


@pytest.mark.parametrize(("how", "status"), [("end", "success"), ("raise", "failed"), ("teardown", "success")])
@pytest.mark.parametrize("devices", [1, 2])
def test_loggers_are_finalized_at_the_end_of_the_script(how: str, status: str, devices: int, tmp_path: Path) -> None:
    """Once, on rank 0, also without ``teardown``, and told whether an exception ended it; any object will do."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, str(script), how, str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == (how == "raise"), done.stderr
    assert done.stdout.splitlines() == ["metrics {'loss': 1} None of rank 0", f"{status} of rank 0"], done.stderr


def test_leaving_a_with_block_by_an_exception_is_a_failure(tmp_path: Path) -> None:
    """The status is that of the block."""
    seen = []

    class Own:
        def log_metrics(self, metrics: Any, step: Any) -> None: ...

        def finalize(self, status: str) -> None:
            seen.append(status)

    def fail(_fabric: Fabric) -> None:
        raise KeyError

    with pytest.raises(KeyError), Fabric(accelerator="cpu", devices=1, loggers=[Own()]) as fabric:
        fabric.launch(fail)
    with Fabric(accelerator="cpu", devices=1, loggers=[Own()]) as fabric:
        fabric.launch()
    assert seen == ["failed", "success"]


def test_one_object_without_log_metrics_is_refused() -> None:
    """The error says what is wanted."""
    with pytest.raises(RequestError, match="no Logger"):
        Fabric(accelerator="cpu", devices=1, loggers=object())


def _folders(root: str) -> tuple[list[str], int]:
    loggers = [CSVLogger(root, "csv"), TensorBoardLogger(root, "events"), JSONLLogger(root, "lines")]
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2, loggers=loggers)
    fabric.launch()
    if fabric.is_global_zero:
        fabric.log("loss", 1.0)
    fabric.barrier()
    for logger in loggers:
        logger.log_metrics({"loss": 2.0})  # as scripts call it, on every rank
        logger.log_hyperparams({"rate": 1})
    if not fabric.is_global_zero:
        loggers[1].experiment.add_histogram("weights", torch.ones(3))
        loggers[1].experiment.whatever(1)["x"] = 2
    folders = [str(Path(logger.log_dir).relative_to(root)) for logger in loggers]
    fabric.teardown()
    return folders, len(rows(loggers[0].log_dir))


def test_ranks_agree_on_the_folder_and_the_first_writes(two_ranks: RankPool, tmp_path: Path) -> None:
    """Although rank 0 has made its folder before rank 1 asks for the name."""
    (tmp_path / "csv" / "version_3").mkdir(parents=True)
    (left, count), (right, _) = two_ranks.run(_folders, str(tmp_path))
    assert left == right == ["csv/version_4", "events/version_0", "lines/version_0"]
    assert count == 2


def test_tensorboard_s_own(tmp_path: Path) -> None:
    """Its writer, its folder in the run's folder, grouped values, the graph, and settings with metrics."""
    logger = TensorBoardLogger(tmp_path, sub_dir="inner", max_queue=3)
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0" / "inner")
    assert isinstance(logger.experiment, SummaryWriter)
    logger.log_metrics({"both": {"left": 1.0, "right": torch.tensor(2.0)}}, 3)
    logger.log_graph(torch.nn.Linear(2, 1), torch.ones(1, 2))
    logger.log_hyperparams({"rate": 0.5, "nested": {"flag": True}}, {"score": torch.tensor(7.0)}, step=2)
    with pytest.raises(ValueError, match="no input"):
        logger.log_graph(torch.nn.Linear(2, 1))
    logger.finalize("success")
    found = {name: value for row in rows(logger.log_dir) for name, value in row.items()}
    assert found["score"] == 7
    assert sorted(path.name for path in Path(logger.log_dir).iterdir() if path.is_dir()) == ["both_left", "both_right"]


def test_text_names_a_logger_with_its_options(tmp_path: Path) -> None:
    """As for every plugin."""
    fabric = Fabric(accelerator="cpu", devices=1, loggers=f"csv:root_dir={tmp_path},name=x,flush_logs_every_n_steps=1")
    fabric.log("a", 1)
    assert isinstance(fabric.logger, CSVLogger)
    assert rows(tmp_path / "x" / "version_0") == [{"step": 0, "a": 1}]
