"""What is noted of gradients that were not averaged: hooks come and go, and cost next to nothing."""

import copy
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.conformance.references import Averaging
from fabric_core.contracts import StrategyCapabilities
from fabric_core.errors import MisuseError


def _hooks(net: nn.Module) -> int:
    return sum(len(one._post_accumulate_grad_hooks or ()) for one in net.parameters())


def _hooks_of_a_life() -> list[int]:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        model = fabric.setup(net)
        seen = [_hooks(net)]
        twin, shallow = copy.deepcopy(model), copy.copy(model)
        seen += [_hooks(net), _hooks(twin.module), _hooks(copy.deepcopy(net))]
        del shallow
    return [*seen, _hooks(net), _hooks(twin.module)]


def test_hooks_go_at_teardown_and_are_made_anew_in_copies(two_ranks: RankPool) -> None:
    """One for each parameter; a deep copy has its own, a shallow one shares them, a bare copy has none."""
    assert two_ranks.run(_hooks_of_a_life) == [[4, 4, 4, 0, 0, 0]] * 2


def _none_alone() -> int:
    with Fabric(accelerator="cpu", strategy="ddp", devices=1) as fabric:
        net = nn.Linear(1, 1)
        fabric.setup(net)
        return _hooks(net)


def test_one_process_pays_nothing() -> None:
    """Without others to average with, there is no hook."""
    assert _none_alone() == 0


class LocalSteps(Averaging):
    """Averages nothing before a step, and says so."""

    capabilities = StrategyCapabilities(distributed=True, synchronous=False)

    def averages(self, module: nn.Module) -> bool:
        return False


class Forgetful(Averaging):
    """Averages nothing either, and doesn't say so: its own answer tells."""

    def averages(self, module: nn.Module) -> bool:
        return False

    def gradients_averaged(self, module: nn.Module, complete: bool) -> bool:
        return False


def _step(strategy: Any) -> str:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        net = nn.Linear(2, 1)
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        fabric.backward(model(torch.ones(1, 2)).sum())
        try:
            optimizer.step()
        except MisuseError as error:
            return str(error)
        return "stepped"


def _steps() -> list[str]:
    return [_step(LocalSteps()), _step(Forgetful()), _step(Averaging())]


def test_only_synchronous_strategies_are_held_to_it(two_ranks: RankPool) -> None:
    """One that declares otherwise steps; one that averages nothing and doesn't declare it, raises."""
    for local, forgetful, averaging in two_ranks.run(_steps):
        assert local == averaging == "stepped"
        assert "gradients were not averaged over the ranks" in forgetful
        assert "on gradients of Linear: weight, bias" in forgetful
        assert "the strategy averaged nothing" in forgetful


def _raw(fabric: Fabric, model: Any) -> None:
    model(torch.ones(1, 2)).sum().backward()


def _raw_penalty(fabric: Fabric, model: Any) -> None:
    model.weight.square().sum().backward()


def _raw_after_a_failed_one(fabric: Fabric, model: Any) -> None:
    def fail(_gradient: torch.Tensor) -> None:
        raise LookupError

    x = torch.ones(1, 2, requires_grad=True) * 1
    x.register_hook(fail)
    with fabric.no_backward_sync(model):
        with pytest.raises(LookupError):
            model(x).sum().backward()
        assert model.weight.grad is not None
        model.zero_grad()
        _raw(fabric, model)


def _a_part(fabric: Fabric, model: Any) -> None:
    model.bias.requires_grad_(False)
    fabric.backward(model(torch.ones(1, 2)).sum())


def _averages_itself(how: str) -> Any:
    def act(fabric: Fabric, model: Any) -> None:
        with fabric.no_backward_sync(model):
            fabric.backward(model(torch.full((1, 2), fabric.global_rank + 1.0)).sum())
        for one in model.parameters():
            if how == "mean":
                one.grad = fabric.all_reduce(one.grad)
            elif how == "sum":
                one.grad.copy_(fabric.all_reduce(one.grad, reduce_op="sum") / fabric.world_size)
            else:
                fabric.all_reduce(one.grad)  # the result is dropped

    return act


def _step_after(act: Any, strategy: Any) -> str:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        net = nn.Linear(2, 1)
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        act(fabric, model)
        try:
            optimizer.step()
        except MisuseError as error:
            return str(error)
        return "stepped"


def _steps_after() -> list[str]:
    return [
        _step_after(_raw, "ddp"),
        _step_after(_raw_penalty, Averaging()),
        _step_after(_raw_after_a_failed_one, "ddp"),
        _step_after(_a_part, "ddp"),
    ]


def test_a_raw_backward_steps_where_it_was_averaged(two_ranks: RankPool) -> None:
    """By DDP's hooks it was; not by a strategy that averages afterwards, nor without synchronization, nor in part."""
    for raw, penalty, failed, part in two_ranks.run(_steps_after):
        assert raw == "stepped"
        assert "loss.backward() was called directly, and the strategy averages in fabric.backward(loss)" in penalty
        assert "the backward pass followed no forward pass of the model that fabric.setup returned" in failed
        assert "the strategy waits for gradients of bias" in part


def _cleared() -> list[list[float]]:
    weights = []
    for of_the_model in (False, True):
        with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
            fabric.launch()
            net = nn.Linear(2, 2, bias=False)
            nn.init.zeros_(net.weight)
            model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1.0))
            with fabric.no_backward_sync(model):
                fabric.backward(model(torch.full((1, 2), 5.0)).sum())
            (model if of_the_model else optimizer).zero_grad()
            fabric.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            whole: Any = model.weight
            weights.append(whole.full_tensor().flatten().tolist())
    return weights


def test_what_a_sharded_model_keeps_back_is_cleared_too(two_ranks: RankPool) -> None:
    """Gradients that weren't synchronized are no attribute under FSDP2; ``zero_grad`` clears them all the same."""
    assert two_ranks.run(_cleared) == [[[-1.0] * 4] * 2] * 2


def _steps_averaged_by_the_script() -> list[str]:
    return [_step_after(_averages_itself(how), "ddp") for how in ("mean", "sum", "not")]


def test_a_script_may_average_gradients_itself(two_ranks: RankPool) -> None:
    """By a mean, or by a sum that it divides, in other memory too; what it only looked at is still each rank's own."""
    for mean, divided, dropped in two_ranks.run(_steps_averaged_by_the_script):
        assert mean == divided == "stepped"
        assert "on gradients of Linear: weight" in dropped


def _step_on_a_later_layer(case: str) -> str:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        net = nn.Sequential(nn.Linear(2, 1))
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        optimizer.step()
        net.append(nn.Linear(1, 1).requires_grad_(case != "frozen"))
        own: Any = torch.optim.SGD(net[1].parameters(), lr=0.1)
        if case in {"added", "frozen"}:
            optimizer.add_param_group({"params": list(net[1].parameters())})
        fabric.backward(model(torch.ones(1, 2)).sum())
        try:
            (own if case == "directly" else optimizer).step()
        except MisuseError as error:
            return str(error)
        return "stepped"


def _steps_on_a_later_layer() -> list[str]:
    return [_step_on_a_later_layer(case) for case in ("added", "directly", "frozen", "held by no optimizer")]


def test_what_was_put_into_a_model_after_setup_is_not_trained(two_ranks: RankPool) -> None:
    """DDP doesn't average it: a step on it is refused; what is frozen, or not stepped on, may be there."""
    for added, directly, *others in two_ranks.run(_steps_on_a_later_layer):
        for refused in (added, directly):
            assert "parameters were put into the model after setup" in refused
            assert "on Sequential" in refused
            assert "1.weight, 1.bias" in refused
        assert others == ["stepped", "stepped"]


def _cost(count: int) -> float:
    """Give the microseconds that noting adds to a backward pass, at the best."""
    parameters = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(count)])
    fastest = []
    with Fabric(accelerator="cpu", strategy=Averaging(), devices=2) as fabric:
        fabric.launch()
        torch.set_num_threads(1)

        def once() -> float:
            total = sum(parameters[1:], parameters[0]).sum()
            start = time.perf_counter()
            total.backward()
            return (time.perf_counter() - start) * 1e6

        fastest.append(min(once() for _ in range(200)))
        fabric._setup._sync.watch(parameters, parameters)  # type: ignore[union-attr]
        fastest.append(min(once() for _ in range(200)))
    return fastest[1] - fastest[0]


def test_noting_is_cheap(two_ranks: RankPool) -> None:
    """At most 1 µs for each parameter and 50 µs for a pass, with room for a busy machine."""
    count = 300
    assert min(two_ranks.run(_cost, count)) < 2 * (count + 50)


class Drawing(Dataset[list[float]]):
    """Gives what the sources of random numbers give."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> list[float]:
        import random

        import numpy as np

        numpys, pythons = float(np.random.rand()), random.random()  # noqa: NPY002, S311 - what users draw from
        return [index, torch.rand(()).item(), numpys, pythons]


def _drawn(workers: int, persistent: bool) -> list[Any]:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        fabric.seed_everything(42)
        # A rank of the pool would start workers that import PyTorch again; a script's are forked.
        given: dict[str, Any] = {"multiprocessing_context": "fork", "persistent_workers": persistent} if workers else {}
        loader = fabric.setup_dataloaders(DataLoader(Drawing(), batch_size=2, num_workers=workers, **given))
        return [[[column.tolist() for column in batch] for batch in loader] for _ in range(2)]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_items_draw_other_numbers_on_every_rank_and_in_every_epoch(workers: int, persistent: bool) -> None:
    """By PyTorch, NumPy and Python alike; and the same ones when all is run again."""
    with RankPool(2, parents=True) as pool:
        first, again = pool.run(_drawn, workers, persistent), pool.run(_drawn, workers, persistent)
    assert first == again
    for source in (1, 2, 3):
        drawn = [number for rank in first for epoch in rank for batch in epoch for number in batch[source]]
        assert len(set(drawn)) == len(drawn) == 16


def _unlaunched() -> str:
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    scale = torch.ones((), requires_grad=True)
    try:
        fabric.backward(scale * 2)
    except MisuseError as error:
        assert scale.grad is None
        return str(error)
    return "nothing was said"


def test_a_backward_pass_before_the_launch_is_refused() -> None:
    """With two processes planned, it says to launch first."""
    assert "fabric.launch()" in _unlaunched()


def _mean(values: Mapping[int, int]) -> tuple[str, float]:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        mean = fabric.all_reduce(torch.tensor(values[fabric.global_rank]))
        return str(mean.dtype), mean.item()


def test_the_mean_of_whole_numbers_is_one(two_ranks: RankPool) -> None:
    """Nothing is cut off: the mean of 1 and 2 is 1.5."""
    assert two_ranks.run(_mean, {0: 1, 1: 2}) == [("torch.float32", 1.5)] * 2
