"""Collectives against raw ``torch.distributed``, which every rank can compute by itself from what all ranks gave."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool, RankRaised
from fabric_core.errors import LaunchError, MisuseError, RequestError

STRATEGIES = ["ddp", "fsdp"]
DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip
REDUCTIONS: dict[str, Callable[[Sequence[int]], float]] = {
    "sum": sum,
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "min": min,
    "product": lambda values: functools.reduce(lambda a, b: a * b, values),
}


def _reduced(strategy: str) -> dict[tuple[torch.dtype, str], Any]:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        own = torch.tensor([fabric.global_rank + 2, 3])
        results = {}
        for dtype in DTYPES:
            given = own.to(dtype)
            for name in REDUCTIONS:
                result = fabric.all_reduce(given, reduce_op=name)
                exact = not dtype.is_floating_point and name == "mean"
                assert result.dtype == (torch.float32 if exact else dtype)
                results[dtype, name] = result.tolist()
            assert torch.equal(given, own.to(dtype)), "what was given is left as it was"
        return results


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_reduce_keeps_the_type(strategy: str, two_ranks: RankPool) -> None:
    """Every reduction of every type is the arithmetic's result, as the type rounds it, on every rank."""
    for results in two_ranks.run(_reduced, strategy):
        for (dtype, name), got in results.items():
            values = [[int(torch.tensor(rank + 2).to(dtype)), int(torch.tensor(3).to(dtype))] for rank in range(2)]
            expected = [REDUCTIONS[name](column) for column in zip(*values, strict=True)]
            exact = not dtype.is_floating_point and name == "mean"
            rounded = torch.tensor(expected, dtype=torch.float64).to(torch.float32 if exact else dtype)
            assert got == rounded.tolist(), (dtype, name)


def _nested() -> Any:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        rank = fabric.global_rank
        data = {"a": torch.full((2,), float(rank)), "b": [rank, (torch.tensor(rank * 4), "text")]}
        reduced = fabric.all_reduce(data)
        gathered = fabric.all_gather(data)
        uneven = fabric.all_gather(torch.arange(6.0).view(2, 3)[:, : rank + 1])
        empty = fabric.all_gather(torch.ones(rank, 2))
        return (
            [reduced["a"].tolist(), int(reduced["b"][0]), int(reduced["b"][1][0]), reduced["b"][1][1]],
            [gathered["a"].tolist(), gathered["b"][0].tolist(), gathered["b"][1][0].tolist(), gathered["b"][1][1]],
            [part.tolist() for part in uneven],
            [tuple(part.shape) for part in empty],
        )


def test_nested_and_uneven(two_ranks: RankPool) -> None:
    """Every tensor and number of a nesting takes part; tensors of different sizes come back as they were."""
    for reduced, gathered, uneven, empty in two_ranks.run(_nested):
        assert reduced == [[0.5, 0.5], 0, 2, "text"]
        assert gathered == [[[0.0, 0.0], [1.0, 1.0]], [0, 1], [0, 4], "text"]
        assert uneven == [[[0.0], [3.0]], [[0.0, 1.0], [3.0, 4.0]]]
        assert empty == [(0, 2), (1, 2)]


def _gradient() -> Any:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        own = torch.tensor([1.0 + fabric.global_rank], requires_grad=True)
        torch.autograd.backward((fabric.all_gather(own, sync_grads=True) ** 2).sum())
        assert own.grad is not None
        return own.grad.tolist()


def test_gradients_flow_through_a_gather(two_ranks: RankPool) -> None:
    """The gradients of all ranks' losses come back to the rank that the tensor came from, summed."""
    assert two_ranks.run(_gradient) == [[4.0], [8.0]]


def _broadcast(strategy: str) -> Any:
    with Fabric(accelerator="cpu", strategy=strategy, devices=4) as fabric:
        fabric.launch()
        received = [fabric.broadcast({"from": fabric.global_rank, "x": {1, 2}}, src=source) for source in range(4)]
        with pytest.raises(RequestError, match="no such rank"):
            fabric.broadcast(1, src=4)
        fabric.barrier("here")
        return received


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_broadcast_from_any_rank(strategy: str, four_ranks: RankPool) -> None:
    """Every rank gets the object of the one that was named."""
    for received in four_ranks.run(_broadcast, strategy):
        assert received == [{"from": source, "x": {1, 2}} for source in range(4)]


def _group() -> Any:
    with Fabric(accelerator="cpu", strategy="ddp", devices=4) as fabric:
        fabric.launch()
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        group = groups[fabric.global_rank % 2]
        own = torch.tensor(float(fabric.global_rank))
        return fabric.all_reduce(own, group=group).item(), fabric.all_gather(own, group=group).tolist()


def test_within_a_group(four_ranks: RankPool) -> None:
    """A group reduces and gathers its own ranks alone."""
    assert four_ranks.run(_group) == [(1.0, [0.0, 2.0]), (2.0, [1.0, 3.0])] * 2


def _first(fails: bool, local: bool) -> Any:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        order: list[int] = []
        with fabric.rank_zero_first(local=local):
            if fabric.global_rank == 0:
                fabric.strategy.world.open_store().set("who", "zero ran")  # type: ignore[attr-defined]
                if fails:
                    raise ZeroDivisionError("no data")
            order.append(fabric.strategy.world.open_store().get("who"))  # type: ignore[attr-defined]
        return order


@pytest.mark.parametrize("local", [False, True])
def test_rank_zero_goes_first(local: bool, two_ranks: RankPool) -> None:
    """When another rank runs the block, rank 0 has run it."""
    assert two_ranks.run(_first, False, local) == [[b"zero ran"], [b"zero ran"]]


def test_rank_zero_raising_releases_the_others(two_ranks: RankPool) -> None:
    """The others don't run the block; they raise what says that rank 0 failed, and why."""
    with pytest.raises(RankRaised) as caught:
        two_ranks.run(_first, True, False)
    first, second = caught.value.errors
    assert first is not None
    assert second is not None
    assert "ZeroDivisionError: no data" in first
    assert f"{LaunchError.__name__}: rank 0 failed: ZeroDivisionError: no data" in second


@pytest.mark.parametrize(
    "call",
    [
        lambda fabric: fabric.all_reduce(1.0),
        lambda fabric: fabric.all_gather(1.0),
        lambda fabric: fabric.broadcast(1),
        lambda fabric: fabric.barrier(),
        lambda fabric: fabric.rank_zero_first().__enter__(),
    ],
    ids=["all_reduce", "all_gather", "broadcast", "barrier", "rank_zero_first"],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_misuse_before_launch_says_so(strategy: str, call: Callable[[Fabric], Any]) -> None:
    """A collective before ``launch`` is refused with the call that is missing."""
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2)
    with pytest.raises(MisuseError, match=r"fabric\.launch\(\)"):
        call(fabric)


def _refused(data: str) -> Any:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        rank = fabric.global_rank
        if data == "reduction":
            fabric.all_reduce(torch.ones(1), reduce_op="median")
        elif data == "types":
            fabric.all_gather(torch.ones(1, dtype=[torch.float32, torch.int64][rank]))
        else:
            fabric.all_gather(torch.ones(rank + 1, requires_grad=True), sync_grads=True)


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        ("reduction", RequestError, "median.*sum, mean"),
        ("types", MisuseError, "torch.int64 of shape .* on rank 1"),
        ("sizes", MisuseError, "pad the tensors"),
    ],
)
def test_what_cannot_be_done_is_an_error_on_every_rank(
    data: str, kind: type[Exception], text: str, two_ranks: RankPool
) -> None:
    """No rank is left waiting: the error comes before anything that the others would have to join."""
    with pytest.raises(RankRaised) as caught:
        two_ranks.run(_refused, data)
    for error in caught.value.errors:
        assert error is not None
        assert kind.__name__ in error
        assert re.search(text, error, re.DOTALL), error
