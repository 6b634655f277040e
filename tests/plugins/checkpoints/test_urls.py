"""Behind a URL: what holds for local paths holds in ``fsspec``'s memory and in a real object store on loopback."""

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import CheckpointError, NoCheckpointError
from fabric_plugins.checkpoints import SafetensorsCheckpoint

FORMATS = ["single_file", "distributed", "safetensors"]
Environment = dict[str, str]


@pytest.fixture(scope="module")
def store() -> Iterator[Environment]:
    """Start an object store with one bucket; gives the variables by which clients find it."""
    for name in ("moto", "s3fs", "flask_cors"):
        pytest.importorskip(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    variables = {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "NO_PROXY": "127.0.0.1",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    try:
        for _ in range(600):
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        with patch.dict(os.environ, variables):
            fsspec.filesystem("s3").mkdir("bucket")
        yield variables
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give a folder of its own, in the one and in the other."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    for name, value in request.getfixturevalue("store").items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}"


def _linear(value: float) -> nn.Linear:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def _state(value: float, form: str) -> dict[str, Any]:
    state: dict[str, Any] = {"model": _linear(value)}
    return state if form == "safetensors" else {**state, "value": value}


def _value(fabric: Fabric, url: str, form: str) -> float:
    state = _state(0.0, form)
    fabric.load(url, state)
    assert state["model"].weight.unique().numel() == 1
    assert state.get("value", state["model"].weight[0, 0]) == state["model"].weight[0, 0]
    return float(state["model"].weight[0, 0].item())


@pytest.mark.parametrize("form", FORMATS)
def test_saved_replaced_and_loaded(form: str, root: str) -> None:
    """One replaces the other, nothing of the old one stays, and what is no checkpoint is not replaced."""
    system, inside = fsspec.core.url_to_fs(root)
    with Fabric(accelerator="cpu", devices=1) as fabric:
        for value in (1.0, 2.0):
            fabric.save(f"{root}/run/state", _state(value, form), format=form)
            assert _value(fabric, f"{root}/run/state", form) == value
        assert len(system.find(f"{inside}/run/state")) == {"single_file": 1, "distributed": 4, "safetensors": 2}[form]
        with pytest.raises(NoCheckpointError):
            fabric.load(f"{root}/run/other", _state(0.0, form))
        system.pipe_file(f"{inside}/mine/notes.txt", b"mine")
        system.pipe_file(f"{inside}/text", b"mine")
        for name in ("text", "mine"):
            with pytest.raises(CheckpointError, match="is not replaced"):
                fabric.save(f"{root}/{name}", _state(1.0, form), format=form)
        assert system.cat_file(f"{inside}/text") == system.cat_file(f"{inside}/mine/notes.txt") == b"mine"


def test_safetensors_as_a_file_and_in_parts(root: str, tmp_path: Path) -> None:
    """Both come back; a folder that was copied from there is one here, and Hugging Face's own is read there."""
    system, inside = fsspec.core.url_to_fs(root)
    with Fabric(accelerator="cpu", devices=1, plugins=[SafetensorsCheckpoint(max_shard_size=20)]) as fabric:
        fabric.save(f"{root}/a.safetensors", _state(3.0, "safetensors"))
        fabric.save(f"{root}/parts", _state(4.0, "safetensors"))
        assert [_value(fabric, f"{root}/{name}", "safetensors") for name in ("a.safetensors", "parts")] == [3, 4]
        system.get(f"{inside}/parts", str(tmp_path / "parts"), recursive=True)
        assert _value(fabric, str(tmp_path / "parts"), "safetensors") == 4
        (inner,) = (tmp_path / "parts").glob("g-*")
        assert (inner / "model.safetensors.index.json").exists()
        for one in inner.iterdir():
            system.put_file(str(one), f"{inside}/theirs/{one.name}")
        other = nn.Linear(3, 2)
        fabric.load_raw(f"{root}/theirs", other)
        assert other.weight.eq(4).all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_save_that_is_cut_off_leaves_the_old_one(form: str, root: str) -> None:
    """Whichever upload fails; the next save sweeps what came before that."""
    system, inside = fsspec.core.url_to_fs(root)
    send = system.put_file
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.save(f"{root}/state", _state(1.0, form), format=form)
        count = len(system.find(f"{inside}/state"))
        for failing in range(count):
            done: list[str] = []

            def cut(here: str, there: str, done: list[str] = done, at: int = failing) -> None:
                if len(done) == at:
                    raise ConnectionResetError("the line is dead")
                done.append(there)
                send(here, there)

            with patch.object(system, "put_file", cut), pytest.raises(CheckpointError, match="the line is dead"):
                fabric.save(f"{root}/state", _state(2.0, form), format=form)
            assert _value(fabric, f"{root}/state", form) == 1
        fabric.save(f"{root}/state", _state(3.0, form), format=form)
        assert _value(fabric, f"{root}/state", form) == 3
        assert len(system.find(f"{inside}/state")) == count


@pytest.mark.parametrize("form", FORMATS)
def test_the_newest_and_the_best_stay_and_the_latest_is_found(form: str, root: str) -> None:
    """``keep``, ``score`` and ``folder/latest`` work as in local folders."""
    system, inside = fsspec.core.url_to_fs(root)

    def names() -> set[str]:
        system.invalidate_cache()
        return {str(one).rstrip("/").rpartition("/")[2] for one in system.ls(inside, detail=False)}

    with Fabric(accelerator="cpu", devices=1) as fabric:
        with pytest.raises(NoCheckpointError, match="no checkpoint in the folder"):
            fabric.load(f"{root}/latest")
        for step in (8, 9, 10):
            fabric.save(f"{root}/step-{step}", _state(step, form), keep=2, format=form)
        assert names() == {"step-9", "step-10"}
        assert _value(fabric, f"{root}/latest", form) == 10
        for step, score in enumerate([0.5, 0.1, 0.9]):
            fabric.save(f"{root}/best-{step}", _state(step, form), keep=2, score=score, format=form)
        assert names() == {"step-9", "step-10", "best-1", "best-2"}


def test_a_store_that_does_not_answer_is_no_empty_one(root: str) -> None:
    """A script that takes "none" for an answer would start anew, and save over what it could not see."""
    system = fsspec.core.url_to_fs(root)[0]

    def dead(*_: Any, **__: Any) -> Any:
        raise ConnectionResetError("the line is dead")

    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.save(f"{root}/state", {"value": 1})
        with patch.multiple(system, isfile=dead, open=dead, ls=dead, exists=dead, cat_file=dead):
            for name in ("state", "latest"):
                with pytest.raises(CheckpointError, match="the line is dead") as caught:
                    fabric.load(f"{root}/{name}")
                assert not isinstance(caught.value, NoCheckpointError)


def _by_two(environment: Environment, url: str) -> list[float]:
    with patch.dict(os.environ, environment), Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        model = fabric.setup(_linear(5.0))
        handle = fabric.save(url, {"model": model}, format="distributed", asynchronous=True)
        assert handle is not None
        handle.result(60)
        other = fabric.setup(_linear(0.0))
        fabric.load(url, {"model": other})
        whole = fabric.strategy.module_state(other.module, True)  # on rank 0
        return [one.min().item() for name, one in whole.items() if name == "weight"]


def test_two_ranks_write_to_the_store_at_once(store: Environment, two_ranks: RankPool) -> None:
    """Each its own objects, in the background; both read them."""
    assert two_ranks.run(_by_two, store, f"s3://bucket/{uuid.uuid4().hex}") == [[5.0], []]


def test_a_url_of_a_local_file_is_its_path(tmp_path: Path) -> None:
    """``file://`` has all that paths have: replaced in one step, and nothing left beside it."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        for value in (1.0, 2.0):
            fabric.save(f"file://{tmp_path}/state", {"value": value})
        assert fabric.load(tmp_path / "state") == {"value": 2.0}
        assert [one.name for one in tmp_path.iterdir()] == ["state"]
        with pytest.raises(CheckpointError, match=r"knows nowhere:"):
            fabric.save("nowhere://a/b", {"value": 1})
