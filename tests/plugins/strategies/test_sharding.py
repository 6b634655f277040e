"""What sharding must not break: names, ties, frozen parts, optimizers of every age, odd outputs, several models."""

import contextlib
import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool, RankRaised
from fabric_core.errors import OptionError
from fabric_plugins.strategies import FSDPStrategy


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + torch.tanh(self.inner(x))
        return y


class Stack(nn.Module):
    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(4, 2)
        if shared:
            first, last = self.blocks[0], self.blocks[2]
            assert isinstance(first, Block)
            assert isinstance(last, Block)
            last.inner.weight = first.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.blocks(x))
        return y


def _x(fabric: Fabric | None = None) -> torch.Tensor:
    """(batch, features), or this rank's part of it."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x if fabric is None else x[fabric.global_rank :: fabric.world_size]


def _full(fabric: Fabric, model: nn.Module) -> dict[str, Any]:
    return {name: value.numpy() for name, value in fabric.strategy.module_state(model, full=True).items()}


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> dict[str, torch.Tensor]:
    for _ in range(steps):
        torch.autograd.backward(model(_x()).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def _steps(fabric: Fabric, model: Any, optimizer: Any, steps: int = 2) -> None:
    for _ in range(steps):
        fabric.backward(model(_x(fabric)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def _same(got: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(got[name]), value, rtol=0, atol=1e-12, msg=name)


def _made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Stack(shared=kind == "shared").double()
    if kind == "frozen":
        model.blocks[1].requires_grad_(False)
        model.head.bias.requires_grad_(False)
    return model


def _train(strategy: str, kind: str) -> Any:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        model = _made(kind)
        wrapped, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.1))
        _steps(fabric, wrapped, optimizer)
        return _full(fabric, model)


@pytest.mark.parametrize("kind", ["shared", "frozen"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp:auto_wrap_policy=null"])
def test_shared_and_frozen_parameters(strategy: str, kind: str, two_ranks: RankPool) -> None:
    """A parameter of two blocks stays one, a frozen one stays as it is, and names stay the bare module's."""
    model = _made(kind)
    _same(two_ranks.run(_train, strategy, kind)[0], _plain(model, torch.optim.Adam(model.parameters(), lr=0.1)))


def _ages(strategy: str, age: str) -> Any:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        model = _made("plain")
        extra = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def make() -> torch.optim.Optimizer:
            return torch.optim.SGD([*model.parameters(), extra], lr=0.1, momentum=0.9)

        optimizer: Any
        if age == "with state":
            raw = make()
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            raw.step()
            raw.zero_grad()
            wrapped, optimizer = fabric.setup(model, raw)
        elif age == "set up before the model":
            optimizer = fabric.setup_optimizers(make())
            wrapped = fabric.setup(model)
        else:
            wrapped = fabric.setup(model)
            with torch.no_grad():
                wrapped(_x(fabric))  # leaves the root's parameters whole
            optimizer = fabric.setup_optimizers(make())
        _steps(fabric, wrapped, optimizer)
        return _full(fabric, model)


def leave(_model: nn.Module, _mesh: Any) -> None:
    """Leave all of it to the strategy."""


@pytest.mark.parametrize("age", ["with state", "set up before the model", "made after an evaluation"])
@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp", f"model_parallel:parallelize_fn={__name__}:leave,tensor_parallel_size=1"]
)
def test_optimizers_of_every_age_train(strategy: str, age: str, two_ranks: RankPool) -> None:
    """Whenever an optimizer was made, it trains what the model computes with, and its momentum is kept."""
    model = _made("plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if age == "with state":
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    _same(two_ranks.run(_ages, strategy, age)[0], _plain(model, optimizer))


def _leak() -> bool:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        model = _made("plain")
        old = [weakref.ref(parameter) for parameter in model.parameters()]
        wrapped, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
        _steps(fabric, wrapped, optimizer)
        gc.collect()
        return any(one() is not None for one in old)


def test_replaced_parameters_are_let_go(two_ranks: RankPool) -> None:
    """Once it is sharded, nothing keeps a whole parameter in memory."""
    assert two_ranks.run(_leak) == [False, False]


def _mixed_layouts() -> None:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        model = _made("plain")
        extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
        fabric.setup(model, torch.optim.Adam([*model.parameters(), extra], fused=True))


def test_a_fused_optimizer_over_several_layouts_is_refused(two_ranks: RankPool) -> None:
    """What PyTorch would refuse at the first step is refused at once, with what to write."""
    with pytest.raises(RankRaised, match=r"Adam\(fused=False\)"):
        two_ranks.run(_mixed_layouts)


def _one_step(kind: str) -> None:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        model = _made("plain")
        fused = kind == "fused"
        parameters = model.parameters()
        wrapped, optimizer = fabric.setup(
            model, torch.optim.SGD(parameters, fused=True) if fused else torch.optim.Rprop(parameters)
        )
        _steps(fabric, wrapped, optimizer, 1)


@pytest.mark.parametrize("kind", ["fused", "Rprop"])
def test_an_optimizer_that_cannot_step_on_shards_says_so(kind: str, two_ranks: RankPool) -> None:
    """What PyTorch has no rule for is an error that names the optimizer, and one that works."""
    with pytest.raises(RankRaised, match=r"can't do on divided parameters[\s\S]*AdamW and SGD always work"):
        two_ranks.run(_one_step, kind)


def _factored() -> None:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        model = _made("plain")
        optimizer = torch.optim.Adafactor(model.parameters())
        _plain(model, optimizer)
        fabric.setup(model, optimizer)


def test_state_that_nobody_can_divide_is_refused(two_ranks: RankPool) -> None:
    """State of another shape than its parameter's, such as Adafactor's, is named instead of being left whole."""
    with pytest.raises(RankRaised, match=r"'row_var' can't be divided"):
        two_ranks.run(_factored)


class WithHead(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.body(x))
        return y


def _shared_body() -> None:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        body = Stack()
        one, other = WithHead(body), WithHead(body)
        with torch.no_grad():
            fabric.setup(one)(_x(fabric).float())  # leaves parameters of the body whole
        fabric.setup(other)


def test_two_models_that_share_a_part_are_refused(two_ranks: RankPool) -> None:
    """The error names what is shared, and what to set up instead."""
    with pytest.raises(
        RankRaised, match=r"divided among the ranks already[\s\S]*body\.head[\s\S]*one module that holds"
    ):
        two_ranks.run(_shared_body)


@dataclasses.dataclass
class Answer:
    y: torch.Tensor
    extra: Any


class Pair(NamedTuple):
    y: torch.Tensor
    extra: Any


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stack, self.kind = Stack(), kind
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> Any:
        y = self.stack(x)
        self.seen[:] = [y]
        return {"dataclass": Answer(y, "text"), "tuple": (y, None), "named": Pair(y, 1), "nothing": None}[self.kind]


def _odd(strategy: str, kind: str) -> Any:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        torch.manual_seed(0)
        model = Odd(kind).double()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(2):
            out = wrapped(_x(fabric))
            if kind == "nothing":
                assert out is None
                continue
            assert type(out).__name__ == {"dataclass": "Answer", "tuple": "tuple", "named": "Pair"}[kind]
            fabric.backward((out[0] if isinstance(out, tuple) else out.y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return _full(fabric, model.stack)


@pytest.mark.parametrize("kind", ["dataclass", "tuple", "named", "nothing"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp:auto_wrap_policy=null,reshard_after_forward=true"])
def test_what_a_model_returns(strategy: str, kind: str, two_ranks: RankPool) -> None:
    """Dataclasses, tuples and nothing come back as they are, and the model trains through them."""
    model = _made("plain")
    expected = _plain(model, torch.optim.SGD(model.parameters(), lr=0.1), 0 if kind == "nothing" else 2)
    _same(two_ranks.run(_odd, strategy, kind)[0], expected)


class NoReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), NoReset()


def _unmade() -> None:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        with fabric.init_module(empty_init=True):
            model = Outer()
        fabric.setup(model)


def test_a_module_that_cannot_make_its_values_is_named(two_ranks: RankPool) -> None:
    """A module on the meta device without ``reset_parameters`` is an error with its name and what it has."""
    with pytest.raises(RankRaised, match=r"second \(NoReset\) has scale .* reset_parameters"):
        two_ranks.run(_unmade)


def _units(policy: Any) -> list[str]:
    from torch.distributed.fsdp import FSDPModule

    with Fabric(accelerator="cpu", strategy=FSDPStrategy(auto_wrap_policy=policy), devices=2) as fabric:
        fabric.launch()
        model = Stack()
        fabric.setup(model)
        return [name for name, one in model.named_modules() if isinstance(one, FSDPModule)]


def _is_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == 2


@pytest.mark.parametrize(
    ("policy", "units"),
    [
        ("auto", ["blocks.0", "blocks.1", "blocks.2"]),
        ({Block}, ["blocks.0", "blocks.1", "blocks.2"]),
        ({"Block", nn.Linear}, [f"blocks.{i}{part}" for i in range(3) for part in ("", ".inner")] + ["head"]),
        (_is_head, ["head"]),
        (None, []),
    ],
    ids=["auto", "classes", "names", "callable", "none"],
)
def test_units(policy: Any, units: list[str], two_ranks: RankPool) -> None:
    """A policy's modules are the units, beside the root."""
    assert two_ranks.run(_units, policy) == [units, units]


def test_a_class_that_the_model_has_not_is_an_error(two_ranks: RankPool) -> None:
    """A class of no module is named, with those that there are."""
    with pytest.raises(RankRaised, match=r"no Blok[\s\S]*Block, Linear"):
        two_ranks.run(_units, {"Blok"})


@pytest.mark.parametrize(
    "text",
    [
        "fsdp:replicate=3",
        "fsdp:replicate=2,shard=2",
        "model_parallel:parallelize_fn=builtins:id,data_parallel_size=3",
        "fsdp:shard=1",
    ],
)
def test_sizes_that_do_not_fit(text: str, two_ranks: RankPool) -> None:
    """Sizes whose product is not the number of processes are an error that says what to write."""
    with pytest.raises(RankRaised, match="product is the number of processes"):
        two_ranks.run(_launch, text)


def test_the_function_that_spreads_a_model_is_required() -> None:
    """Without it the strategy is refused where it is named, not when a model is set up."""
    with pytest.raises(OptionError, match="parallelize_fn"):
        Fabric(accelerator="cpu", strategy="model_parallel", devices=2)


def _launch(strategy: str) -> None:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()


def _gradients(model: nn.Module) -> list[Any]:
    from torch.distributed.tensor import DTensor

    grads = [one.grad for one in model.parameters()]
    return [
        one.full_tensor().numpy() if isinstance(one, DTensor) else None if one is None else one.numpy().copy()
        for one in grads
    ]


def _accumulate(strategy: str) -> Any:
    """Two models; one skips gradient synchronization: nested, with an exception, and the other does not."""
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        models = [_made("plain"), _made("plain")]
        one, other = (fabric.setup(model) for model in models)

        def run(model: Any) -> None:
            fabric.backward(model(_x(fabric)).square().mean())

        with fabric.no_backward_sync(one):
            with fabric.no_backward_sync(one, enabled=False):
                run(one)
            with contextlib.suppress(KeyError), fabric.no_backward_sync(one):
                run(one)
                raise KeyError
            run(one)  # still apart: the inner contexts have restored what was
            run(other)
        run(one)
        return [_gradients(model) for model in models]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp:auto_wrap_policy=null"])
def test_no_backward_sync_nests_and_restores(strategy: str, two_ranks: RankPool) -> None:
    """Unsynchronized gradients, whatever came between, are averaged at the next backward; of that model alone."""
    model = _made("plain")
    torch.autograd.backward(model(_x()).square().mean())
    single = [one.grad for one in model.parameters()]
    for first, second in two_ranks.run(_accumulate, strategy):
        for got, other, expected in zip(first, second, single, strict=True):
            assert expected is not None
            torch.testing.assert_close(torch.from_numpy(got), expected * 4, rtol=0, atol=1e-12)
            torch.testing.assert_close(torch.from_numpy(other), expected, rtol=0, atol=1e-12)


def _again(names: list[str]) -> Any:
    import torch.distributed as dist

    results = []
    for name in names:
        with Fabric(accelerator="cpu", strategy=name, devices=2) as fabric:
            fabric.launch()
            model = _made("plain")
            wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            _steps(fabric, wrapped, optimizer)
            results.append(_full(fabric, model))
        assert not dist.is_initialized()
        fabric.teardown()
    return results


def _count_threads() -> int:
    """Count this process's threads but autograd's, which PyTorch keeps: one for each device that it is built for."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it ended as it was looked at
            count += not (task / "comm").read_text().startswith("pt_autograd")
    return count


def _threads(strategy: str) -> tuple[list[int], list[int]]:
    """Count threads during and after each of several trainings, each of another shape.

    Not before the first one: a rank keeps a thread that waits for its agent's end, and PyTorch may keep others.
    """
    during, apart = [], []
    for width in range(3, 7):
        with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
            fabric.launch()
            model = nn.Linear(width, width)
            wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            fabric.backward(wrapped(torch.ones(2, width)).square().mean())
            fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
            optimizer.step()
            fabric.strategy.module_state(model, full=True)
            during.append(_count_threads())
        del fabric, model, wrapped, optimizer
        gc.collect()
        apart.append(_count_threads())
    return during, apart


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux shows a process's threads there")
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp:replicate=2"])
def test_no_thread_outlives_its_fabric(strategy: str) -> None:
    """The process groups that a mesh is made of end with it, whatever shapes were divided and put together again."""
    with RankPool(2) as pool:
        for during, apart in pool.run(_threads, strategy):
            assert len(set(apart)) == 1, apart
            assert min(during) > apart[0], "a process group's own threads are not seen"


def test_one_fabric_after_another(two_ranks: RankPool) -> None:
    """In one process, one ``Fabric`` after another works, and each gives the process group back."""
    model = _made("plain")
    expected = _plain(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for results in two_ranks.run(_again, ["ddp", "fsdp", "fsdp_cpu_offload", "ddp"])[:1]:
        for state in results:
            _same(state, expected)
