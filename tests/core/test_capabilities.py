"""Every capability, declared both ways: what the core does differs, and is what the declaration says."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from fabric_core import Fabric, Launcher, Wrapper
from fabric_core.choosing.registry import registered
from fabric_core.collectives import Collectives, SingleProcess, World
from fabric_core.contracts import (
    LaunchOrder,
    PrecisionPolicy,
    ProcessInfo,
    capabilities,
)
from fabric_core.errors import FabricError

from .conftest import Alone, Host, Plain, Shelf

Arguments = dict[str, Any]


class Pair(SingleProcess):
    """Rank 0 of two, whose other rank always has the same."""

    world_size = 2

    def fork(self) -> SingleProcess:
        return Pair()


class Both(Alone):
    """A strategy that can do what the rows declare."""

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        return Pair() if world.world_size > 1 else SingleProcess()

    def setup_module(self, module: nn.Module) -> nn.Module:
        self.seen.append(f"setup_module {type(module).__name__} {next(module.parameters()).dtype}")
        return module

    def setup_jointly(self, module: nn.Module, optimizers: Sequence[Any]) -> tuple[nn.Module, list[Any]]:
        self.seen.append("setup_jointly")
        return module, list(optimizers)

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()


class Started(Launcher):
    """Recognises a process of two, on one node or on two."""

    nodes = 1

    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        return ProcessInfo(world_size=2, local_world_size=2 // self.nodes)

    def start(self, order: LaunchOrder) -> Any:
        raise AssertionError("it was recognised")


class OnTwoNodes(Started):
    nodes = 2


class Halving(Plain):
    """Computes in bfloat16, by autocast."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(compute_dtype=torch.bfloat16, input_dtype=torch.bfloat16, autocast=True)


class Scaling(Plain):
    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(loss_scaling=True)


class Used(Host):
    """A device that this process has used already."""

    def is_started(self) -> bool:
        return True


class Forking(Both):
    start_method = "fork"


class Mark(Wrapper):
    """Notes the stage at which it is asked."""

    def wrap_module(self, module: nn.Module) -> nn.Module:
        return nn.Sequential(module) if self.capabilities.stage == "after_strategy" else module

    def state_dict(self) -> dict[str, Any]:
        return {"marks": 1}


class Other(Mark):
    pass


class Folders(Shelf):
    """Knows which of its methods wrote."""

    wrote = ""

    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        self.wrote = "write"
        self.tree = dict(tree)

    def write_sharded(self, path: Path, tree: Mapping[str, Any], collectives: Collectives) -> None:
        self.wrote = "write_sharded"
        self.tree = dict(tree)

    def read(self, path: Any, into: Mapping[str, Any] | None) -> dict[str, Any]:
        return dict(self.tree)

    def recognises(self, path: Any) -> bool:
        return True


def _declaring(base: type[Any], **declared: Any) -> type[Any]:
    """Make a plugin's class that declares this beside what its base does."""
    kind = type(base.capabilities)
    return type(base.__name__, (base,), {"capabilities": kind(**{**base.capabilities.model_dump(), **declared})})


def _said(act: Callable[[], Any]) -> Any:
    """Give what came out, or the error."""
    try:
        return act()
    except FabricError as error:
        return str(error)


class Act:
    """What is tried with a capability declared one way and the other.

    Args:
        try_: Is given the arguments of ``Fabric`` and the value; gives what was seen.
        seen: For each value to declare, what is seen: a result, or a part of the error.
    """

    def __init__(self, try_: Callable[[Arguments, Any], Any], seen: Mapping[Any, Any]) -> None:
        self.try_ = try_
        self.seen = seen


def _strategy(name: str, base: type[Any] = Both, **also: Any) -> Callable[[Arguments, Any], Arguments]:
    return lambda given, value: {**given, "strategy": _declaring(base, **{"max_world_size": 2, **also, name: value})()}


def _two(given: Arguments, launcher: Launcher | None = None) -> Arguments:
    return {**given, "devices": 2, "plugins": [*given["plugins"], launcher or Started()]}


def _made(name: str, **also: Any) -> Callable[[Arguments, Any], Any]:
    def act(given: Arguments, value: Any) -> Any:
        with Fabric(**_strategy(name, **also)(given, value)):
            return "made"

    return act


def _set_up(fabric: Fabric, count: int = 1, optimizers: int = 1) -> Any:
    models = [nn.Linear(2, 2) for _ in range(count)]
    return [
        fabric.setup(one, *(torch.optim.SGD(one.parameters(), lr=0.1) for _ in range(optimizers))) for one in models
    ]


def _after_setup(name: str, look: Callable[[Fabric], Any], **also: Any) -> Callable[[Arguments, Any], Any]:
    def act(given: Arguments, value: Any) -> Any:
        with Fabric(**_strategy(name, **also)(given, value)) as fabric:
            return look(fabric)

    return act


def _raw_backward(fabric: Fabric) -> str:
    model, _ = _set_up(fabric)[0]
    model(torch.ones(1, 2)).sum().backward()
    return "allowed"


def _unsynchronized_step(declared: str) -> Callable[[Arguments, Any], Any]:
    def act(given: Arguments, value: Any) -> Any:
        also = {"distributed": True, "no_backward_sync": True, declared: value}
        with Fabric(**_two({**given, "strategy": _declaring(Both, max_world_size=2, **also)()})) as fabric:
            model, optimizer = _set_up(fabric)[0]
            with fabric.no_backward_sync(model):
                fabric.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            return "stepped"

    return act


def _how_set_up(fabric: Fabric) -> str:
    _set_up(fabric)
    assert isinstance(fabric.strategy, Both)
    return fabric.strategy.seen[-1]


def _sharded(given: Arguments, value: Any) -> Any:
    wrapper = _declaring(Mark, supports_sharded_parameters=False)()
    with Fabric(**{**_strategy("sharded")(given, value), "wrappers": [wrapper]}):
        return "made"


def _precision_of_output(fabric: Fabric) -> str:
    model, _ = _set_up(fabric)[0]
    seen: list[torch.dtype] = []

    def note(_module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        seen.append(inputs[0].dtype)
        return inputs[0].float()

    model.module.register_forward_pre_hook(note)
    model(torch.ones(1, 2))
    return str(seen[0])


def _carried(given: Arguments, value: Any) -> Any:
    with Fabric(**{**_strategy("applies_mixed_precision")(given, value), "precision": Halving()}) as fabric:
        return _precision_of_output(fabric)


def _on_meta(fabric: Fabric) -> str:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    fabric.setup(model)
    return "set up"


def _loss_scaling(given: Arguments, value: Any) -> Any:
    with Fabric(**{**_strategy("loss_scaling")(given, value), "precision": Scaling()}):
        return "made"


def _start_methods(given: Arguments, value: Any) -> Any:
    device = _declaring(Used, start_methods=value)()
    with Fabric(**{**given, "accelerator": device, "strategy": _declaring(Forking)()}):
        return "made"


def _precision_types(given: Arguments, value: Any) -> Any:
    with Fabric(**{**given, "precision": _declaring(Plain, device_types=value)()}):
        return "made"


def _stage(given: Arguments, value: Any) -> Any:
    strategy = Both()
    with Fabric(**{**given, "strategy": strategy, "wrappers": [_declaring(Mark, stage=value)()]}) as fabric:
        model, _ = _set_up(fabric)[0]
        return type(model._fabric_called).__name__


def _order(name: str) -> Callable[[Arguments, Any], Any]:
    def act(given: Arguments, value: Any) -> Any:
        mark = _declaring(Mark, **{name: value})
        with registered("wrapper", "mark", mark), registered("wrapper", "other", Other):
            order = ["other", "mark"] if name == "before" else ["mark", "other"]
            with Fabric(**{**given, "wrappers": order}):
                return "made"

    return act


def _wrapper_and_shards(given: Arguments, value: Any) -> Any:
    wrapper = _declaring(Mark, supports_sharded_parameters=value)()
    with Fabric(**{**given, "strategy": _declaring(Both, sharded=True)(), "wrappers": [wrapper]}):
        return "made"


def _nodes(given: Arguments, value: Any) -> Any:
    launcher = _declaring(OnTwoNodes, multi_node=value)()
    two = {**_two({**given, "strategy": _declaring(Both, max_world_size=2)()}, launcher), "devices": 1, "num_nodes": 2}
    with Fabric(**two) as fabric:
        fabric.launch()
        return fabric.world_size


def _saved(path: Any, name: str, look: Callable[[Any], Any]) -> Callable[[Arguments, Any], Any]:
    def act(given: Arguments, value: Any) -> Any:
        one = _declaring(Folders, **{name: value})()
        with Fabric(**{**given, "plugins": [one], "wrappers": [Mark()]}) as fabric:
            model, _ = _set_up(fabric)[0]
            fabric.save(path, {"model": model})
            return look(one)

    return act


def _suffixes(given: Arguments, value: Any) -> Any:
    chosen: list[str] = []

    class First(Folders):
        def write(self, path: Path, tree: Mapping[str, Any]) -> None:
            chosen.append("the first")

    class Boxes(Folders):
        capabilities = capabilities.CheckpointCapabilities(suffixes=value)

        def write(self, path: Path, tree: Mapping[str, Any]) -> None:
            chosen.append("by its suffix")

    offered = [registered("checkpoint", "first", First, auto=999), registered("checkpoint", "boxes", Boxes, auto=998)]
    with offered[0], offered[1], Fabric(**{**given, "plugins": []}) as fabric:
        fabric.save("state.box", {"model": nn.Linear(2, 2)})
    return chosen[0]


_YES_NO: Final = (True, False)

ACTS: Final[dict[tuple[str, str], Act]] = {
    ("Accelerator", "start_methods"): Act(
        _start_methods, {frozenset({"fork"}): "made", frozenset({"spawn"}): "declares only spawn"}
    ),
    ("Strategy", "device_types"): Act(
        _made("device_types"), {None: "made", frozenset({"moon"}): "declares the device types moon"}
    ),
    ("Strategy", "param_dtypes"): Act(
        _after_setup("param_dtypes", _how_set_up),
        {
            frozenset({"float32"}): "setup_module Linear torch.float32",
            frozenset({"bfloat16"}): "declares to train bfloat16 alone",
        },
    ),
    ("Strategy", "min_world_size"): Act(_made("min_world_size"), {1: "made", 2: "at least 2 processes"}),
    ("Strategy", "max_world_size"): Act(
        lambda given, value: _made("max_world_size")({**given, "devices": 2}, value),
        {None: "made", 1: "at most 1 process"},
    ),
    ("Strategy", "distributed"): Act(
        _unsynchronized_step("distributed"), {True: "gradients were not averaged", False: "stepped"}
    ),
    ("Strategy", "synchronous"): Act(
        _unsynchronized_step("synchronous"), {True: "gradients were not averaged", False: "stepped"}
    ),
    ("Strategy", "sharded"): Act(_sharded, {True: "not to work with a strategy that shards", False: "made"}),
    ("Strategy", "intercepts_forward"): Act(
        _after_setup("intercepts_forward", _how_set_up),
        {True: "setup_module Route torch.float32", False: "setup_module Linear torch.float32"},
    ),
    ("Strategy", "applies_mixed_precision"): Act(_carried, {True: "torch.float32", False: "torch.bfloat16"}),
    ("Strategy", "handles_device_placement"): Act(
        _after_setup("handles_device_placement", _on_meta), {True: "set up", False: "meta"}
    ),
    ("Strategy", "requires_strategy_backward"): Act(
        _after_setup("requires_strategy_backward", _raw_backward),
        {True: "was called directly", False: "allowed"},
    ),
    ("Strategy", "loss_scaling"): Act(_loss_scaling, {True: "made", False: "declares not to support"}),
    ("Strategy", "no_backward_sync"): Act(
        _unsynchronized_step("no_backward_sync"), {True: "gradients were not averaged", False: "stepped"}
    ),
    ("Strategy", "multiple_models"): Act(
        _after_setup("multiple_models", lambda fabric: len(_set_up(fabric, count=2))),
        {True: 2, False: "takes one model"},
    ),
    ("Strategy", "multiple_optimizers"): Act(
        _after_setup("multiple_optimizers", lambda fabric: len(_set_up(fabric, optimizers=2)[0])),
        {True: 3, False: "one optimizer"},
    ),
    ("Strategy", "joint_setup"): Act(
        _after_setup("joint_setup", _how_set_up),
        {True: "setup_jointly", False: "setup_module Linear torch.float32"},
    ),
    ("Precision", "device_types"): Act(
        _precision_types, {None: "made", frozenset({"moon"}): "declares the device types moon"}
    ),
    ("Wrapper", "stage"): Act(_stage, {"before_strategy": "Linear", "after_strategy": "Sequential"}),
    ("Wrapper", "before"): Act(_order("before"), {frozenset(): "made", frozenset({"other"}): "must come after"}),
    ("Wrapper", "after"): Act(_order("after"), {frozenset(): "made", frozenset({"other"}): "must come after"}),
    ("Wrapper", "supports_sharded_parameters"): Act(
        _wrapper_and_shards, {True: "made", False: "not to work with a strategy that shards"}
    ),
    ("Launcher", "multi_node"): Act(_nodes, {True: 2, False: "doesn't declare multi_node"}),
    ("Checkpoint", "sharded"): Act(
        _saved(Path("state"), "sharded", lambda one: one.wrote), {True: "write_sharded", False: "write"}
    ),
    ("Checkpoint", "suffixes"): Act(_suffixes, {(".box",): "by its suffix", (): "the first"}),
    ("Checkpoint", "plain_values"): Act(
        _saved(Path("state"), "plain_values", lambda one: "marks" in str(one.tree)), {True: True, False: False}
    ),
    ("Checkpoint", "remote"): Act(
        _saved("memory://state", "remote", lambda one: one.wrote),
        {True: "write", False: "this format writes local files alone"},
    ),
}
"""For each capability what is tried, and what is seen with each value."""


def _declared() -> Iterator[tuple[str, str]]:
    for name, kind in inspect.getmembers(capabilities, lambda one: inspect.isclass(one) and issubclass(one, BaseModel)):
        if name.endswith("Capabilities") and not name.startswith("_"):
            yield from ((name.removesuffix("Capabilities"), field) for field in kind.model_fields)


def test_every_capability_stands_in_the_table() -> None:
    """A new one needs a row: what the core does where it is declared, and where not."""
    assert set(_declared()) == set(ACTS)
    assert all(len(act.seen) == len(_YES_NO) for act in ACTS.values())


@pytest.mark.parametrize(
    ("row", "value"),
    [pytest.param(row, value, id=f"{'-'.join(row)}-{value}") for row, act in ACTS.items() for value in act.seen],
)
def test_the_core_acts_on_what_is_declared(row: tuple[str, str], value: Any, in_memory: Arguments) -> None:
    """With each value the core does what the declaration says."""
    act = ACTS[row]
    expected, seen = act.seen[value], _said(lambda: act.try_(in_memory, value))
    assert expected in seen if isinstance(expected, str) else seen == expected
