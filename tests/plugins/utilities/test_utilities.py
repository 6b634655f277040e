"""What scripts use beside a ``Fabric``; where Lightning is installed, it gives the same."""

import importlib.util
import os
import pickle
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fabric_core.utilities as ours
from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.utilities import (
    AttributeDict,
    SingleDeviceCollective,
    Throughput,
    ThroughputMonitor,
    TorchCollective,
    is_shared_filesystem,
    measure_flops,
    move_data_to_device,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
    suggested_max_num_workers,
)

INSTALLED = importlib.util.find_spec("lightning") is not None
_FEEDS: list[list[dict[str, Any]]] = [
    [{"time": 2.0 * i, "batches": i, "samples": 4 * i} for i in range(1, 6)],
    [{"time": 2.0 * i, "batches": i, "samples": 4 * i, "lengths": 40 * i, "flops": 10} for i in range(1, 6)],
    [{"time": 0.0, "batches": 0, "samples": 0}, {"time": 1.0, "batches": 1, "samples": 1, "flops": 3}],
    [{"time": 1.0, "batches": 3, "samples": 2}],
    [{"time": 1.0, "batches": 3, "samples": 5, "lengths": 4}],
    [{"time": 1.0, "batches": 1, "samples": 2}, {"time": 0.5, "batches": 2, "samples": 2}],
    [{"time": 1.0, "batches": 2, "samples": 2}, {"time": 2.0, "batches": 1, "samples": 2}],
    [{"time": 1.0, "batches": 1, "samples": 2}, {"time": 2.0, "batches": 2, "samples": 3, "lengths": 9}],
]


def _rates(cls: Any, feed: list[dict[str, Any]], **given: Any) -> list[Any]:
    counter, seen = cls(window_size=3, **given), []
    for update in feed:
        try:
            counter.update(**update)
            seen.append(counter.compute())
        except (ValueError, RuntimeError) as error:
            seen.append(type(error))
    return seen


def test_rates_are_of_the_window() -> None:
    """Totals at once, rates when the window is full: of a device, of all, and of what the device could do."""
    rates = _rates(Throughput, _FEEDS[1], available_flops=100.0, world_size=2)
    assert rates[1] == {"time": 4.0, "batches": 2, "samples": 8, "lengths": 80}
    assert rates[2] == {
        "time": 6.0, "batches": 3, "samples": 12, "lengths": 120,
        "device/batches_per_sec": 0.5, "device/samples_per_sec": 2.0, "device/items_per_sec": 20.0,
        "device/flops_per_sec": 5.0, "device/mfu": 0.05,
        "batches_per_sec": 1.0, "samples_per_sec": 4.0, "items_per_sec": 40.0, "flops_per_sec": 10.0,
    }  # fmt: skip


@pytest.mark.skipif(not INSTALLED, reason="the extra bench is not installed")
@pytest.mark.parametrize("feed", _FEEDS)
@pytest.mark.parametrize("given", [{}, {"world_size": 2, "available_flops": 100.0, "separator": "_"}])
def test_rates_are_lightning_s(feed: list[dict[str, Any]], given: dict[str, Any]) -> None:
    """The same numbers under the same names, and the same builtin classes of errors."""
    from lightning.fabric.utilities.throughput import Throughput as Theirs

    assert _rates(Throughput, feed, **given) == _rates(Theirs, feed, **given)


class _Taking:
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log_metrics(self, metrics: Any, step: Any) -> None:
        self.rows.append((step, metrics))


def test_a_monitor_logs() -> None:
    """Under its own count of calls, or the step that it is given; reset, it begins anew."""
    logger = _Taking()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=logger)
    monitor = ThroughputMonitor(fabric, window_size=2)
    monitor.update(time=1.0, batches=1, samples=2)
    monitor.compute_and_log()
    monitor.update(time=2.0, batches=2, samples=4)
    assert monitor.compute_and_log(step=9)["device/samples_per_sec"] == 2
    assert [step for step, _ in logger.rows] == [0, 9]
    assert monitor.available_flops is None
    monitor.reset()
    monitor.update(time=1.0, batches=1, samples=2)  # less than before
    assert monitor.compute() == {"time": 1.0, "batches": 1, "samples": 2}
    fabric.teardown()


def test_operations_are_counted() -> None:
    """Two for each multiplication and addition, three times as many with the backward pass; gradients stay."""
    model = nn.Linear(8, 4, bias=False)
    x = torch.ones(2, 8, requires_grad=True)
    model.weight.grad = kept = torch.ones(4, 8)
    assert measure_flops(model, lambda: model(x)) == 2 * 2 * 8 * 4
    assert measure_flops(model, lambda: model(x), lambda y: y.sum()) == 3 * 2 * 2 * 8 * 4
    assert model.weight.grad is kept
    with torch.device("meta"):
        large = nn.Linear(10**5, 10**5)
        there = torch.ones(1, 10**5)
    assert measure_flops(large, lambda: large(there)) == 2 * 10**10


def test_entries_are_attributes() -> None:
    """Set, read, deleted; what is absent is an ``AttributeError``; it pickles."""
    settings = AttributeDict(rate=1)
    settings.name = "x"
    assert settings["name"] == settings.name == "x"
    del settings.rate
    assert settings == {"name": "x"}
    with pytest.raises(AttributeError, match="'AttributeDict' object has no attribute 'rate'"):
        settings.rate  # noqa: B018
    assert pickle.loads(pickle.dumps(settings)).name == "x"  # noqa: S301 - made right here
    assert repr(AttributeDict(a=1, long=2)) == "'a':    1\n'long': 2"


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """One core of each process's is left to itself, and nobody gets none."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [suggested_max_num_workers(count) for count in (1, 2, 3, 8, 9)] == [7, 3, 1, 1, 1]
    with pytest.raises(ValueError, match="at least 1"):
        suggested_max_num_workers(0)


def test_batches_move() -> None:
    """Nested tensors, to a device by its name."""
    batch = {"x": [torch.ones(1)], "y": 3}
    assert move_data_to_device(batch, "meta")["x"][0].device.type == "meta"
    assert move_data_to_device(batch, torch.device("cpu")) is batch


def test_only_rank_0_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By the launcher's variables, or what a program says; others give the default."""
    add = rank_zero_only(lambda a, b: a + b)
    with_default = rank_zero_only(lambda: 1, default=7)
    for variable in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    assert (add(1, b=2), with_default()) == (3, 1)
    with pytest.warns(UserWarning, match="take care"):
        rank_zero_warn("take care")
    with caplog.at_level("INFO", "fabric_core"):
        rank_zero_info("said %s", "so")
    assert caplog.messages == ["said so"]
    monkeypatch.setenv("RANK", "1")
    assert (add(1, b=2), with_default()) == (None, 7)
    rank_zero_warn("unsaid")
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert add(1, b=2) == 3
    rank_zero_only.rank = None


def _between_ranks(folder: str) -> list[Any]:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        rank = fabric.global_rank
        found: list[Any] = [is_shared_filesystem(fabric.strategy, folder, timeout=1)]
        found.append(is_shared_filesystem(fabric.strategy, Path(folder) / str(rank), timeout=1))
        found.append(rank_zero_only(lambda: "first")())
        own = TorchCollective().setup().create_group(ranks=[0, 1])
        found += [own.rank == rank, own.world_size, own.all_reduce(torch.tensor([rank + 1.0])).item()]
        found += [one.item() for one in own.all_gather([torch.zeros(1), torch.zeros(1)], torch.tensor([float(rank)]))]
        found += own.broadcast_object_list([rank], src=1)
        found.append(own.all_reduce(torch.tensor([rank]), "max").item())
        own.barrier()
        own.teardown()
        return found


def test_between_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    """A shared folder is found out, one rank is the first, and a group of one's own works."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    left, right = two_ranks.run(_between_ranks, str(tmp_path))
    assert left == [True, False, "first", True, 2, 3.0, 0.0, 1.0, 1, 1]
    assert right == [True, False, None, True, 2, 3.0, 0.0, 1.0, 1, 1]
    assert not list(tmp_path.glob("tmp*"))


def _every_operation() -> list[Any]:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        rank = fabric.global_rank
        own = TorchCollective().create_group(timeout=timedelta(seconds=10))
        mine, pair = torch.tensor([rank + 1.0]), [torch.tensor([rank + 1.0]), torch.tensor([rank + 10.0])]
        last = rank == 1
        found: list[Any] = [
            own.broadcast(mine.clone(), src=1),
            own.reduce(mine.clone(), dst=1, op="max") if last else own.reduce(mine.clone(), dst=1, op="max") * 0,
            own.gather(mine, [torch.zeros(1), torch.zeros(1)] if last else [], dst=1),
            own.scatter(torch.zeros(1), pair if last else [], src=1),
            own.reduce_scatter(torch.zeros(1), pair, op="product"),
            own.all_to_all([torch.zeros(1), torch.zeros(1)], pair),
        ]
        own.send(mine, 1, tag=5) if rank == 0 else found.append(own.recv(torch.zeros(1), 0, tag=5))
        found += own.gather_object(rank, [None, None] if last else [], dst=1)
        found += own.scatter_object_list([None], ["a", "b"] if last else [], src=1)
        found += own.all_gather_object([None, None], rank)
        own.monitored_barrier(timeout=timedelta(seconds=10))
        own.teardown()
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.item, found)  # type: ignore[no-any-return]


def test_every_operation_between_ranks(two_ranks: RankPool) -> None:
    """Each goes to the rank, from the rank, with the operation and under the tag that it is given."""
    assert two_ranks.run(_every_operation) == [
        [2.0, 0.0, [], 2.0, 2.0, [1.0, 2.0], "a", 0, 1],
        [2.0, 2.0, [1.0, 2.0], 11.0, 110.0, [10.0, 11.0], 1.0, 0, 1, "b", 0, 1],
    ]


def test_a_default_group_that_was_made_is_destroyed() -> None:
    """With the group of one's own, or without one; what isn't there any more can't be destroyed."""
    for create in (True, False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        own = TorchCollective().setup(main_address="127.0.0.1", main_port=port, backend="gloo", rank=0, world_size=1)
        if create:
            own.create_group()
        own.teardown()
        assert not own.is_initialized()
        with pytest.raises(RuntimeError, match="no group to destroy"):
            own.teardown()


class _Asked(TorchCollective):
    """Writes down what it would make a default group with."""

    asked: ClassVar[list[Any]] = []

    @classmethod
    def is_initialized(cls) -> bool:
        return False

    @classmethod
    def init_group(cls, **kwargs: Any) -> None:
        cls.asked.append(kwargs.get("init_method"))


def test_where_rank_0_listens_is_given_or_in_the_variables() -> None:
    """What isn't given beside the other has a default."""
    for given in ({}, {"main_address": "host"}, {"main_port": "7"}, {"main_address": "host", "main_port": "7"}):
        _Asked().setup(**given)
    assert _Asked.asked == [None, "tcp://host:12910", "tcp://127.0.0.1:7", "tcp://host:7"]


def test_one_process_shares_with_itself(tmp_path: Path) -> None:
    """And a folder that isn't there is an error."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    assert is_shared_filesystem(fabric.strategy)
    assert is_shared_filesystem(fabric.strategy, "s3://bucket/name")
    with pytest.raises(FileNotFoundError):
        is_shared_filesystem(fabric.strategy, tmp_path / "absent")


def test_a_group_of_one() -> None:
    """Everything sent is what is there; a second group, or none, is an error."""
    own = SingleDeviceCollective()
    one = torch.ones(1)
    with pytest.raises(RuntimeError, match="no group"):
        own.group  # noqa: B018
    own.setup().create_group()
    assert own.group is not None
    with pytest.raises(RuntimeError, match="has a group"):
        own.create_group()
    assert own.all_reduce(one, "sum") is own.broadcast(one, 0) is own.all_gather([], one)[0] is one
    own.barrier()
    own.teardown()
    with pytest.raises(RuntimeError, match="no group to destroy"):
        own.teardown()
    with pytest.raises(ValueError, match="no operation"):
        TorchCollective().all_reduce(one, "mix")


def test_a_loop_shows_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Every item comes, in order, and the end tells the count and the rate."""
    fabric = Fabric(accelerator="cpu", devices=1)
    assert list(fabric.track(range(3), "epoch")) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "epoch" in shown
    assert "3/3" in shown
    assert "items/s" in shown
    assert list(fabric.track(iter("ab"), total=2)) == ["a", "b"]


def test_names_are_public() -> None:
    """Every name can be had."""
    assert [name for name in ours.__all__ if getattr(ours, name, None) is None] == []
    assert sorted(ours.__all__) == ours.__all__
