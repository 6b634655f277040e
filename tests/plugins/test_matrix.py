"""The matrix says what ``Fabric(...)`` does: what works trains, and what is refused is refused for that very reason."""

import json
import random
from pathlib import Path
from typing import Any, Self

import pytest

from fabric_core import Fabric, Wrapper, cli
from fabric_core.choosing.lock import Lock
from fabric_core.choosing.registry import Registry, registered
from fabric_core.choosing.request import Request
from fabric_core.cli._matrix import Cell, make_matrix, try_cells
from fabric_core.contracts import PluginOptions, WrapperCapabilities
from fabric_core.errors import FabricError

AXES = {"accelerator": None, "strategy": None, "precision": None, "wrapper": None}
SAMPLED = 5
"""In how many cells that should work a plain run trains; `make whole` trains in all, `make authors` with wheels too."""


def _cells(devices: int, **axes: Any) -> list[Cell]:
    return list(make_matrix(Registry(), Request.of(devices=devices), {}, {**AXES, **axes}))


@pytest.fixture
def fabric(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that runs the command and returns exit code and output."""

    def run(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr("sys.argv", ["fabric-core", "plugins", "matrix", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().out

    return run


@pytest.mark.parametrize("devices", [1, 2])
def test_every_cell_is_what_fabric_does(devices: int) -> None:
    """Over all that is installed: it can be made, or raises the same error, word for word."""
    cells = _cells(devices)
    assert {cell.status for cell in cells} == {"works", "refused", "not tried"}
    for cell in cells:
        asked: dict[str, Any] = {one: getattr(cell, one) for one in ("accelerator", "strategy", "precision")}
        if cell.status == "works":
            with Fabric(**asked, devices=devices) as made:
                assert made.world_size == cell.processes
            continue
        with pytest.raises(FabricError) as caught:
            Fabric(**asked, devices=devices)
        if cell.status == "refused":
            assert (type(caught.value), str(caught.value)) == (type(cell.error), str(cell.error))
            assert cell.reason in str(caught.value)
        else:
            assert "parallelize_fn" in cell.reason
            assert "parallelize_fn" in str(caught.value)


@pytest.mark.sampled(1.0)  # it samples itself: the cells are known when all plugins are imported
def test_what_works_trains(pytestconfig: pytest.Config, draw: random.Random) -> None:
    """On one and on two ranks; a plain run draws a few cells, others each time, and says how to draw them again."""
    cells = [cell for devices in (1, 2) for cell in _cells(devices, accelerator=["cpu"]) if cell.status == "works"]
    if not pytestconfig.getoption("--whole"):
        cells = draw.sample(cells, SAMPLED)
    for cell in try_cells(cells):
        assert cell.shown == "trained", f"{cell} {cell.tried}"


def test_several_nodes_are_not_tried_on_one() -> None:
    """Declared, it works; there is no second machine to train on."""
    request = Request.of(devices=1, num_nodes=2)
    axes = {**AXES, "accelerator": ["cpu"], "strategy": ["ddp"], "precision": ["32-true"]}
    (cell,) = cells = list(make_matrix(Registry(), request, {}, axes))
    assert (cell.status, cell.processes) == ("works", 2)
    (cell,) = try_cells(cells)
    assert (cell.shown, cell.reason) == ("not tried", "it needs several nodes")


def test_every_plugin_stands_in_it_once() -> None:
    """By its first name; with what presets its options beside it, and no other names."""
    precisions = {cell.precision for cell in _cells(1)}
    assert {"32-true", "bf16-mixed"} <= precisions
    assert not {"32", "bf16", "16", "64"} & precisions
    assert {"ddp", "ddp_spawn", "fsdp_cpu_offload"} <= {cell.strategy for cell in _cells(1)}


class Shy(Wrapper):
    capabilities = WrapperCapabilities(supports_sharded_parameters=False)


class Broken(Wrapper):
    def wrap_module(self, module: Any) -> Any:
        raise KeyError("broken")


class NeedyOptions(PluginOptions):
    needed: int


class Needy(Wrapper):
    Options = NeedyOptions


def test_wrappers_are_combined_on_request() -> None:
    """Each that is asked for beside none, with what it declares; ``*`` is each that is installed."""
    axes = {"accelerator": ["cpu"], "strategy": ["ddp", "fsdp"], "precision": ["32-true"]}
    with registered("wrapper", "shy", Shy), registered("wrapper", "needy", Needy):
        found = {(cell.strategy, cell.wrapper): cell for cell in _cells(2, **axes, wrapper=["shy", "needy"])}
        every = {cell.wrapper for cell in _cells(2, **axes, wrapper=["*"])}
        (given,) = [cell for cell in _cells(1, **axes | {"strategy": ["ddp"]}, wrapper=["needy:needed=1"])
                    if cell.wrapper]  # fmt: skip
    assert {where: cell.status for where, cell in found.items()} == {
        ("ddp", None): "works", ("fsdp", None): "works", ("ddp", "shy"): "works", ("fsdp", "shy"): "refused",
        ("ddp", "needy"): "not tried", ("fsdp", "needy"): "not tried",
    }  # fmt: skip
    assert "it declares not to work with a strategy that shards" in found["fsdp", "shy"].reason
    assert found["ddp", "needy"].reason == "the wrapper 'needy' needs needed, an option without a default"
    assert given.status == "works"
    assert {None, "shy", "channels_last"} <= every


def test_a_difference_between_declaration_and_deed_is_named(fabric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What should work and fails is ``failed``, with the exception; the exit code is 1."""
    monkeypatch.setattr("fabric_core.conformance.pool.RankPool", InThisProcess)
    only = (
        "--accelerator",
        "cpu",
        "--strategy",
        "single_device",
        "--precision",
        "32-true",
        "--devices",
        "1",
        "--tried",
    )
    with registered("wrapper", "broken", Broken):
        code, out = fabric(*only, "--wrapper", "broken", "--json")
        table = fabric(*only, "--wrapper", "broken")[1]
    assert code == 1
    assert [(cell["wrapper"], cell["tried"]) for cell in json.loads(out)["cells"]] == [
        (None, ""), ("broken", "rank 0: KeyError: 'broken'"),
    ]  # fmt: skip
    assert "failed 1" in table
    assert "1  rank 0: KeyError: 'broken'" in table


class InThisProcess:
    """Runs what ranks would run here, where a wrapper is registered that no other process knows."""

    def __init__(self, world_size: int) -> None:
        assert world_size == 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def run(self, function: Any, *arguments: Any) -> Any:
        import traceback

        from fabric_core.conformance.pool import RankRaised

        try:
            return [function(*arguments)]
        except Exception as error:
            raise RankRaised(0, traceback.format_exc(), [str(error)]) from error


def test_the_table_has_the_reasons_below_it(fabric: Any) -> None:
    """One line for an accelerator that isn't here; numbers lead from a cell to its reason."""
    code, out = fabric("--devices", "2", "--precision", "32-true", "--precision", "bf16-mixed")
    assert code == 0
    assert "single_device" in out
    assert "it declares at most 1 process, and there would be 2" in out
    assert "xpu: refused: no xpu device can be used here" in out


def test_a_narrow_terminal_gets_several_tables(fabric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is wider than the terminal, and no precision is missing."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    _, out = fabric("--accelerator", "cpu")
    tables = [line for line in out.splitlines() if "━" in line or "│" in line]
    assert max(map(len, tables)) <= 80
    for precision in ("16-mixed", "16-true", "32-true", "64-true", "bf16-mixed", "bf16-true"):
        assert precision in out


def test_the_picture_is_one(fabric: Any, tmp_path: Path) -> None:
    """Written where it was asked for."""
    pytest.importorskip("matplotlib", reason="the extra examples brings matplotlib")
    path = tmp_path / "matrix.png"
    assert fabric("--accelerator", "cpu", "--precision", "32-true", "--png", str(path))[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_a_picture_without_a_folder_is_a_mistake(fabric: Any, tmp_path: Path) -> None:
    """Before anything is resolved."""
    assert fabric("--png", str(tmp_path / "absent" / "matrix.png")) == (2, "")


def test_a_lock_in_a_configuration_file_holds(fabric: Any, tmp_path: Path) -> None:
    """What it doesn't let run is refused in every cell, and imported for none."""
    Lock(str(tmp_path / "fabric.lock"), ()).write()
    (tmp_path / "run.toml").write_text(f'lock = "{tmp_path}/fabric.lock"\n')
    cells = json.loads(fabric("--accelerator", "cpu", "--json", "--config", str(tmp_path / "run.toml"))[1])["cells"]
    assert {cell["error"]["type"] for cell in cells} == {"LockError"}
    assert all("the lock has no distribution fabric-registry" in cell["reason"] for cell in cells)


def test_a_name_that_nobody_offers_is_a_mistake(fabric: Any) -> None:
    """And no cell that is refused."""
    code, out = fabric("--strategy", "dpp", "--json")
    assert (code, json.loads(out)["error"]["type"]) == (2, "UnknownPluginError")


def test_a_configuration_file_gives_the_rest(fabric: Any, tmp_path: Path) -> None:
    """Such as the number of devices."""
    path = tmp_path / "run.toml"
    path.write_text("devices = 2\n")
    only = ("--accelerator", "cpu", "--strategy", "single_device", "--precision", "32-true", "--json")
    (cell,) = json.loads(fabric(*only, "--config", str(path))[1])["cells"]
    assert cell["status"] == "refused"
    assert cell["error"]["type"] == "PlanError"
