"""``Fabric(check=True)``: ranks that are about to do different things learn it at once, with what the others do."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import LaunchError


def _skips_a_reduction(fabric: Fabric, first: bool) -> None:
    if first:
        fabric.all_reduce(torch.ones(1))
    fabric.barrier()


def _another_shape(fabric: Fabric, first: bool) -> None:
    fabric.all_reduce(torch.ones(1 if first else 2))


def _another_operation(fabric: Fabric, first: bool) -> None:
    fabric.all_reduce(torch.ones(1), reduce_op="sum" if first else "mean")


def _another_source(fabric: Fabric, first: bool) -> None:
    fabric.broadcast("word", src=int(first))


def _another_type(fabric: Fabric, first: bool) -> None:
    fabric.all_gather(torch.ones(1, dtype=torch.float32 if first else torch.float64))


def _another_name(fabric: Fabric, first: bool) -> None:
    fabric.barrier("before" if first else "after")


def _another_optimizer(fabric: Fabric, first: bool) -> None:
    model = nn.Linear(2, 1)
    kind = torch.optim.SGD if first else torch.optim.Adagrad
    wrapped, optimizer = fabric.setup(model, kind(model.parameters(), lr=0.1))
    fabric.backward(wrapped(torch.ones(1, 2)).sum())
    optimizer.step()


def _another_collective(fabric: Fabric, first: bool) -> None:
    if first:
        fabric.all_gather(torch.ones(1))
    else:
        fabric.all_reduce(torch.ones(1))


def _one_batch_more(fabric: Fabric, first: bool) -> None:
    model = nn.Linear(2, 1)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2 if first else 1):
        fabric.backward(wrapped(torch.ones(1, 2)).sum())
        optimizer.step()
    fabric.all_reduce(torch.ones(1))


def _a_step_less(fabric: Fabric, first: bool) -> None:
    model = nn.Linear(2, 1)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        fabric.backward(wrapped(torch.ones(1, 2)).sum())
        if first:
            optimizer.step()


def _ends_early(fabric: Fabric, first: bool) -> None:
    if not first:
        fabric.barrier()


def _saves_on_one_rank(fabric: Fabric, first: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if first:
            fabric.save(Path(folder) / "saved", {"epoch": 1})
        fabric.barrier()


def _mismatched(act: Callable[[Fabric, bool], None], strategy: str) -> tuple[str, float]:
    begin = time.monotonic()
    with Fabric(accelerator="cpu", strategy=strategy, devices=2, check=True) as fabric:
        fabric.launch()
        begin = time.monotonic()
        try:
            act(fabric, fabric.is_global_zero)
        except LaunchError as error:
            return str(error), time.monotonic() - begin
    return "", time.monotonic() - begin


_NAMED: dict[Callable[[Fabric, bool], None], tuple[str, str]] = {
    _skips_a_reduction: ("all_reduce(float32 [1]", "barrier"),
    _another_shape: ("float32 [1]", "float32 [2]"),
    _another_operation: ("'sum'", "'mean'"),
    _another_source: ("src=1", "src=0"),
    _another_type: ("all_gather(float32", "all_gather(float64"),
    _another_name: ("barrier(before)", "barrier(after)"),
    _another_optimizer: ("SGD.step", "Adagrad.step"),
    _another_collective: ("all_gather", "all_reduce"),
    _one_batch_more: ("forward of", "all_reduce"),
    _a_step_less: ("SGD.step", "forward of"),
    _saves_on_one_rank: ("broadcast", "barrier"),
    _ends_early: ("the end of its Fabric", "barrier"),
}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("act", _NAMED)
def test_a_mismatch_is_named_on_every_rank(act: Any, strategy: str, two_ranks: RankPool) -> None:
    """Within five seconds, with what each rank is about to do and the line of the user's code."""
    results = two_ranks.run(_mismatched, act, strategy)
    told = results[1:] if act is _ends_early else results
    for text, seconds in told:
        assert "about to do different things" in text
        assert all(name in text for name in _NAMED[act])
        assert f"{__file__}:" in text
        assert seconds < 5


def _evaluates_alone(fabric: Fabric, first: bool) -> None:
    model = fabric.setup(nn.Linear(2, 1))
    if first:
        with torch.no_grad():
            model(torch.ones(1, 2))
    fabric.barrier()


def test_one_rank_evaluates_alone_where_that_does_not_communicate(two_ranks: RankPool) -> None:
    """Under sharding a pass without gradients gathers parameters, so all ranks must make it; else one may."""
    assert [text for text, _ in two_ranks.run(_mismatched, _evaluates_alone, "ddp")] == ["", ""]
    for text, _ in two_ranks.run(_mismatched, _evaluates_alone, "fsdp"):
        assert "forward of" in text
        assert "barrier" in text


def _right(strategy: str) -> float:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2, check=True) as fabric:
        fabric.launch()
        model = nn.Linear(2, 1)
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(3):
            fabric.backward(wrapped(torch.ones(1, 2)).sum())
            optimizer.step()
        fabric.barrier("the same")
        with fabric.rank_zero_first():
            pass
        uneven = fabric.all_gather(torch.ones(fabric.global_rank + 1))
        assert [len(one) for one in uneven] == [1, 2]
        return float(fabric.all_reduce(torch.tensor(float(fabric.global_rank)), reduce_op="sum"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_right_program_runs_as_before(strategy: str, two_ranks: RankPool) -> None:
    """Nothing is refused that all ranks do."""
    assert two_ranks.run(_right, strategy) == [1.0, 1.0]


def _waits(capture: str) -> None:
    import contextlib
    import io
    from pathlib import Path

    text = io.StringIO()
    with (
        contextlib.redirect_stderr(text),
        Fabric(accelerator="cpu", strategy="ddp", devices=2, warn_after=0.4) as fabric,
    ):
        fabric.launch()
        if fabric.is_global_zero:
            time.sleep(1.5)
        fabric.barrier("here")
        fabric.barrier("again")
    Path(f"{capture}-{fabric.world_size}-{torch.distributed.is_initialized()}").touch()
    if text.getvalue():
        Path(capture).write_text(text.getvalue(), encoding="utf-8")


def test_a_long_wait_is_told(two_ranks: RankPool, tmp_path: Any) -> None:
    """Who waits, where, for how long, and where the others are; once for each wait."""
    two_ranks.run(_waits, str(tmp_path / "told"))
    text = (tmp_path / "told").read_text(encoding="utf-8")
    assert text.count("has waited") == 1
    assert "[fabric, rank 1]" in text
    assert f"rank 1 in barrier(here) at {__file__}:" in text
    assert "rank 0 in no collective of Fabric's" in text


def _fails_alone() -> str:
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    fabric.launch()
    said = ""
    if fabric.is_global_zero:
        try:
            fabric.broadcast(lambda: None)  # nothing that can travel
        except Exception as error:  # noqa: BLE001 - whatever pickling raises
            said = error.__notes__[0]
        fabric.broadcast(None)
    else:
        fabric.broadcast(None)
    fabric.teardown()
    return said


def test_a_failed_collective_says_which_call_it_was_in(two_ranks: RankPool) -> None:
    """Its error has a note with the collective and the line of the user's code, without the checked mode too."""
    said, _ = two_ranks.run(_fails_alone)
    assert said.startswith(f"in broadcast at {__file__}:")
